"""What evaluation harnesses write, recognised by name and content and read as flat numbers.

==========================  =============================================================
``*_SUMMARY.json``          OpenUnlearning (TOFU, MUSE, LMEval): metric → number
``*_EVAL.json``             its log: metric → ``{"agg_value": number, …}``
``results_*.json``          lm-eval: ``results`` → task → ``{"acc,none": number, …}``; it puts
                            a date at the end of any name: ``NAME_2026-01-31T12-00-00.json``
``eval_log_aggregated.json``  TOFU's own: per-question losses of four splits
``scores.json``             ``uipe-merge evaluate``
``*.csv``                   a table by ``variant`` or ``alpha``, or one row (TOFU's
                            ``aggregate_stat.csv``)
==========================  =============================================================

All of them may hold bare ``NaN`` and ``Infinity``, ``null`` where a metric could not be
computed, and strings ("N/A") beside the numbers. A standard error is not a score: dropped.
"""

from __future__ import annotations

import csv
import io
import math
import re
from typing import TYPE_CHECKING, NamedTuple

from uipe_merge.checkpoint import strict_json
from uipe_merge.errors import CorruptInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

_LM_EVAL = re.compile(r"results(_.*)?\.json|.*_\d{4}-\d\d-\d\dT[\d.-]+\.json")
_LOG, _SUMMARY = "_EVAL.json", "_SUMMARY.json"
_RAW_LOG, _RAW_SUMMARY = "eval_log_aggregated.json", "aggregate_stat.csv"
_OWN = "scores.json"

_MOST_VALUES = 2_000_000
"""Of one document: a log of long answers has a comma every few words."""

# As TOFU's own table calls the parts of model utility.
_PARTS = {"probability": "prob", "world_facts": "real_world"}
_NOT_SCORES = frozenset({"schema", "limit", "max_new_tokens", "sample_len", "sample_count"})


class Record(NamedTuple):
    """Numbers of one model, and which one it says it is.

    Attributes:
        values: Normalised metric name → number; not finite where the harness said so.
        variant: Name of the variant, where a column gives it.
        alpha: Its α, likewise.
        family: Its family, likewise.
        manifest_sha256: Digest of the manifest of the model that was evaluated.
    """

    values: dict[str, float]
    variant: str | None = None
    alpha: float | None = None
    family: str | None = None
    manifest_sha256: str | None = None

    @property
    def anonymous(self) -> bool:
        """Whether it does not say whose the numbers are."""
        return self.variant is None and self.alpha is None

    def about(self, name: str, family: str, alpha: float | None) -> bool:
        """Whether the numbers are those of this variant.

        An α without a family is that of the update itself: a control has the same ones.
        """
        if self.variant is not None:
            return self.variant == name
        if self.alpha is None or alpha is None:
            return False
        same = math.isclose(self.alpha, alpha, rel_tol=1e-9, abs_tol=1e-12)
        return same and (family != "control" if self.family is None else self.family == family)


def normalised(name: str) -> str:
    """Return a metric's name in snake case: ``Forget Quality`` → ``forget_quality``."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip())
    return re.sub(r"[\W_]+", "_", words.casefold()).strip("_")


def recognised(name: str) -> bool:
    """Whether a file of this name may hold scores."""
    return (
        name.endswith((_SUMMARY, _LOG, ".csv"))
        or name in {_RAW_LOG, _OWN}
        or _LM_EVAL.fullmatch(name) is not None
    )


def log_of(summary: str) -> str | None:
    """Return the name of the log that a summary is made from."""
    if summary == _RAW_SUMMARY:
        return _RAW_LOG
    return summary.removesuffix(_SUMMARY) + _LOG if summary.endswith(_SUMMARY) else None


def summary_of(log: str) -> str | None:
    """Return the name of the summary that is made from a log."""
    if log == _RAW_LOG:
        return _RAW_SUMMARY
    return log.removesuffix(_LOG) + _SUMMARY if log.endswith(_LOG) else None


def parse(raw: bytes, path: Path) -> tuple[list[Record], str]:
    """Read the content of a file whose name is recognised.

    Returns:
        What it says of one model or of several; and, where that is nothing, why.

    Raises:
        CorruptInputError: It is not the JSON or the CSV that its name promises.
    """
    if path.suffix == ".csv":
        return [record for record in _table(raw, path) if record.values], "holds no scores"
    try:
        document = strict_json.loads(
            raw, naturals_only=False, any_path=True, most_values=_MOST_VALUES
        )
    except strict_json.StrictJsonError as error:
        raise CorruptInputError(
            f"is not valid JSON: {error}", file=path, remedy="delete it or evaluate again"
        ) from None
    if not isinstance(document, dict):
        raise CorruptInputError(
            "is JSON but not an object of scores", file=path, remedy="delete it or evaluate again"
        )
    if path.name == _RAW_LOG:
        return _tofu(document)
    record = _document(document, path)
    return [record] if record.values else [], "holds no scores"


def _document(document: dict[str, object], path: Path) -> Record:
    if path.name == _OWN:
        return _own(document, path)
    if path.name.endswith(_LOG):
        inner = {name: entry for name, entry in document.items() if isinstance(entry, dict)}
        return Record(_numbers((name, entry.get("agg_value")) for name, entry in inner.items()))
    if path.name.endswith(_SUMMARY):
        return Record(_numbers(document.items()))
    return Record(_numbers(_tasks(document)))


def _tofu(document: dict[str, object]) -> tuple[list[Record], str]:
    """Return model utility and its parts.

    Forget quality needs the same log of a retain model: it is in the table that TOFU makes of
    the two.
    """
    from uipe_merge.study.tofu_logs import from_tofu_log

    try:
        scores = from_tofu_log(document)
    except CorruptInputError as error:  # a log of some of the splits is still a log
        return [], f"holds no model utility: it {error.message}"
    values = {
        f"{_PARTS.get(metric, metric)}_{_PARTS.get(split, split)}": value
        for split, parts in scores.parts.items()
        for metric, value in parts.items()
    }
    return [Record({**values, "model_utility": scores.model_utility})], ""


def _own(document: dict[str, object], path: Path) -> Record:
    if not str(document.get("tool", "")).startswith("uipe-merge"):
        return Record({})
    if document.get("schema") != 1:
        raise CorruptInputError(
            f"has schema {str(document.get('schema'))[:20]}, this version reads 1",
            file=path,
            remedy="use the version of uipe-merge that wrote it",
        )
    digest = document.get("model_manifest_sha256")
    return Record(own_scores(document), manifest_sha256=digest if isinstance(digest, str) else None)


def own_scores(document: Mapping[str, object]) -> dict[str, float]:
    """Return the scores in what ``uipe-merge evaluate`` finds, without those that are not finite."""
    parts = document.get("parts")
    sections: dict[str, object] = {
        **(parts if isinstance(parts, dict) else {}),
        **{name: document.get(name) for name in ("forget", "fluency")},
    }
    return _numbers([*document.items(), *_nested(sections)])


def _tasks(document: dict[str, object]) -> Iterator[tuple[str, object]]:
    results = document.get("results")
    for name, value in _nested(results if isinstance(results, dict) else {}):
        yield name.removesuffix(",none"), value


def _nested(sections: dict[str, object]) -> Iterator[tuple[str, object]]:
    for section, entries in sections.items():
        for name, value in entries.items() if isinstance(entries, dict) else ():
            if name not in _NOT_SCORES:
                yield f"{section}/{name}", value


def _numbers(items: Iterable[tuple[str, object]]) -> dict[str, float]:
    found = {}
    for name, value in items:
        # A filter's name may follow: "acc_stderr,none".
        if name.split(",")[0].endswith("_stderr") or name in _NOT_SCORES:
            continue
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[normalised(name)] = _real(value)
    found.pop("", None)
    return found


def _real(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf if value > 0 else -math.inf


def _table(raw: bytes, path: Path) -> Iterator[Record]:
    try:
        rows = list(csv.DictReader(io.StringIO(raw.decode("utf-8-sig"), newline=""), strict=True))
    except UnicodeDecodeError as error:
        raise CorruptInputError(f"is no CSV: byte {error.start} is not UTF-8", file=path) from None
    except csv.Error as error:
        raise CorruptInputError(f"is no CSV: {error}", file=path) from None
    for row in rows:
        # A row longer than the header has its rest under None, a shorter one None as values.
        cells = {
            normalised(name): value
            for name, value in row.items()
            if isinstance(name, str) and isinstance(value, str)
        }
        numbers = {name: _parsed(value) for name, value in cells.items()}
        yield Record(
            {
                name: value
                for name, value in numbers.items()
                if name not in {"", "alpha", "variant", "family"}
                and value is not None
                and not name.endswith("_stderr")
            },
            variant=cells.get("variant") or None,
            alpha=numbers.get("alpha"),
            family=cells.get("family") or None,
        )


def _parsed(cell: str) -> float | None:
    try:
        return None if "_" in cell else float(cell)  # Python would read 1_000 as a number
    except ValueError:
        return None
