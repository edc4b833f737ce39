"""What a model is asked, and how: the questions of an evaluation with its options. Pure data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from uipe_merge.study import questions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from uipe_merge.study.questions import Question, Questions

BATCH_SIZE, MAX_NEW_TOKENS = 8, 64


@dataclass(frozen=True, slots=True)
class Examination:
    """The questions of an evaluation, and how they are asked.

    Attributes:
        forget: Questions to be forgotten.
        retain: Questions to be kept.
        utility: The other splits of model utility: ``real_authors`` and ``world_facts``.
        batch_size: Sequences that go through the model at once.
        max_new_tokens: Tokens after which an answer is cut off.
        device: ``cpu``, ``cuda``, or ``auto`` for the second where it is available.
        template: The prompt, as for ``Prompts``.
    """

    forget: Sequence[Question]
    retain: Sequence[Question] = ()
    utility: Mapping[str, Sequence[Question]] = field(default_factory=dict)
    batch_size: int = BATCH_SIZE
    max_new_tokens: int = MAX_NEW_TOKENS
    device: str = "auto"
    template: str | None = None

    @property
    def splits(self) -> dict[str, Sequence[Question]]:
        """The splits that have questions."""
        every = {"forget": self.forget, "retain": self.retain, **self.utility}
        return {name: asked for name, asked in every.items() if asked}

    @property
    def identity(self) -> dict[str, object]:
        """What tells its scores from others; batch size and device change them by rounding only."""
        return {
            "questions": {name: _digest(asked) for name, asked in self.splits.items()},
            "max_new_tokens": self.max_new_tokens,
            "template": self.template,
        }

    def score_names(self, *, compared: bool) -> list[str]:
        """Return what its scores are called; ``compared`` with a retain-only model or not."""
        from uipe_merge.study.metrics import METRICS, UTILITY_SPLITS

        kept = [name for name in UTILITY_SPLITS if name in self.splits]
        return [
            *(["forget_quality"] if compared else []),
            *(["model_utility"] if kept else []),
            *("forget_probability", "forget_rouge"),
            *(f"{name}_{metric}" for name in kept for metric in METRICS),
            *(f"fluency_{name}" for name in self.splits),
        ]


def make_examination(  # noqa: PLR0913 - one keyword-only argument an option of the evaluation
    *,
    forget: Questions,
    retain: Questions,
    real_authors: Questions | None = None,
    world_facts: Questions | None = None,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int = MAX_NEW_TOKENS,
    device: str = "auto",
    template: str | None = None,
) -> Examination:
    """Read all questions; ``limit`` leaves the first ones of each split.

    Raises:
        UsageError: A file is not there, or something in a list is no question.
        CorruptInputError: A file does not hold such questions.
        OutputError: One cannot be read.
    """
    further = {"real_authors": real_authors, "world_facts": world_facts}
    utility = {
        name: questions.given(source, name, paraphrased=False, limit=limit)
        for name, source in further.items()
        if source is not None
    }
    return Examination(
        questions.given(forget, "forget", paraphrased=True, limit=limit),
        questions.given(retain, "retain", paraphrased=True, limit=limit),
        utility,
        batch_size,
        max_new_tokens,
        device,
        template,
    )


def _digest(asked: Sequence[Question]) -> str:
    text = json.dumps([question.record for question in asked])
    return hashlib.sha256(text.encode()).hexdigest()
