"""Questions with right and wrong answers, read strictly from JSON or JSON lines.

The form is TOFU's (``locuslab/TOFU`` on the hub, whose ``.json`` files are JSON lines)::

    {"question": "…", "answer": "…",
     "paraphrased_answer": "…",          # the right answer in other words
     "perturbed_answer": ["…", "…"]}     # wrong answers in the same words

Real authors and world facts have no paraphrased answer: their answer stands for it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from uipe_merge.checkpoint import strict_json
from uipe_merge.checkpoint.storage import system_error
from uipe_merge.errors import CorruptInputError, UsageError, listed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LARGEST = 2**27
"""Bytes of a file of questions or of a log; TOFU's largest has 1 MB."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        question: What is asked.
        answer: The right answer.
        perturbed_answers: Wrong answers, one at least.
        paraphrased_answer: The right answer in other words, if there is one.
    """

    question: str
    answer: str
    perturbed_answers: tuple[str, ...]
    paraphrased_answer: str | None = None

    @property
    def record(self) -> dict[str, object]:
        """The same as a file has it."""
        return {
            "question": self.question,
            "answer": self.answer,
            "paraphrased_answer": self.paraphrased_answer,
            "perturbed_answer": list(self.perturbed_answers),
        }


Questions = str | os.PathLike[str] | Sequence[Question | Mapping[str, object]]
"""A file of questions, or a list of them, or of records as a file has them."""


def read(
    path: str | os.PathLike[str], *, paraphrased: bool, limit: int | None = None
) -> list[Question]:
    """Return the questions of a file: a JSON list, or one JSON object a line.

    Args:
        path: The file.
        paraphrased: Demand paraphrased answers. Without them the truth ratio would be taken
            of the very words that were trained on, which is another measure.
        limit: Return this many at most, the first ones; the others are checked all the same.

    Raises:
        UsageError: There is no such file.
        CorruptInputError: It is not such a file; everything that is missing is named.
        OutputError: It cannot be read.
    """
    questions, problems = _checked(_records(read_bytes(path), path), paraphrased=paraphrased)
    if problems:
        raise CorruptInputError(
            listed(problems), file=path, remedy="use one of TOFU's *_perturbed files, or its form"
        )
    if not questions:
        raise CorruptInputError("holds no questions", file=path)
    return questions[:limit]


def given(
    source: Questions, name: str, *, paraphrased: bool, limit: int | None = None
) -> list[Question]:
    """Return the questions of a file, or those of a list, which are looked at as strictly.

    Args:
        source: The file; or questions, or records as a file has them.
        name: What the list is called in messages.
        paraphrased: As for ``read``.
        limit: As for ``read``.

    Raises:
        UsageError: There is no such file, or something in the list is no question.
        CorruptInputError: It is not such a file.
        OutputError: It cannot be read.
    """
    if isinstance(source, str | os.PathLike):
        return read(source, paraphrased=paraphrased, limit=limit)
    records = [each.record if isinstance(each, Question) else dict(each) for each in source]
    places = ((f"question {number}", record) for number, record in enumerate(records, 1))
    questions, problems = _checked(places, paraphrased=paraphrased)
    if problems:
        raise UsageError(f"{name}: {listed(problems)}", remedy="give questions of TOFU's form")
    return questions[:limit]


def _checked(
    records: Iterable[tuple[str, object]], *, paraphrased: bool
) -> tuple[list[Question], list[str]]:
    """Return the questions, and what is wrong with the others."""
    questions, problems = [], []
    for place, record in records:
        found = _question(record, paraphrased=paraphrased)
        if isinstance(found, Question):
            questions.append(found)
        else:
            problems += [f"{place}: {problem}" for problem in found]
    return questions, problems


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Return the content of a regular file of at most ``LARGEST`` bytes.

    Raises:
        UsageError: There is no such file.
        CorruptInputError: It is something else, or larger.
        OutputError: It cannot be read.
    """
    try:
        # A FIFO would wait for its writer otherwise.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CorruptInputError("is not a regular file", file=path)
            if status.st_size > LARGEST:
                raise CorruptInputError(
                    f"is {status.st_size} bytes, more than the {LARGEST} such a file may have",
                    file=path,
                )
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(LARGEST)
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError("no such file", file=path) from None
    except OSError as error:
        raise system_error(error, path) from None


def parse(raw: bytes, path: object, place: str = "") -> object:
    """Return the JSON value that these bytes are; ``path`` and ``place`` are for messages.

    Raises:
        CorruptInputError: They are none.
    """
    try:
        return strict_json.loads(raw, naturals_only=False)
    except strict_json.StrictJsonError as error:
        where = f"{place}: " if place else ""
        raise CorruptInputError(f"{where}is not valid JSON: {error}", file=path) from None


def _records(raw: bytes, path: object) -> Iterator[tuple[str, object]]:
    """Yield each record and where it stands."""
    if raw.lstrip().startswith(b"["):
        document = parse(raw, path)
        records = document if isinstance(document, list) else []
        yield from ((f"record {number}", record) for number, record in enumerate(records, 1))
        return
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            yield f"line {number}", parse(line, path, f"line {number}")


def _question(record: object, *, paraphrased: bool) -> Question | list[str]:
    """Return the question, or everything that keeps it from being one."""
    if not isinstance(record, dict):
        return ["is not an object"]
    texts: dict[str, str] = {}
    problems = []
    wanted = ["question", "answer"]
    if paraphrased or record.get("paraphrased_answer") is not None:
        wanted.append("paraphrased_answer")
    for name in wanted:
        value = record.get(name)
        if isinstance(value, str) and value.strip():
            texts[name] = value
        elif value is None:
            problems.append(f"has no '{name}'")
        else:
            problems.append(f"'{name}' is not a text, or is empty")
    wrong = record.get("perturbed_answer")
    if wrong is None:
        problems.append("has no 'perturbed_answer'")
    elif not (
        isinstance(wrong, list)
        and wrong
        and all(isinstance(text, str) and text.strip() for text in wrong)
    ):
        problems.append("'perturbed_answer' is not a list of texts, or is empty")
    if problems:
        return problems
    return Question(
        texts["question"],
        texts["answer"],
        tuple(wrong) if isinstance(wrong, list) else (),
        texts.get("paraphrased_answer"),
    )
