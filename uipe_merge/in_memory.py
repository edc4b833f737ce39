"""Evaluators of a search that hold one model in memory and move it from α to α.

No trial needs a disk: the model is loaded once, at the first α that is asked for, and its
parameters are moved where they lie. Where all trials are known already it is not loaded at all.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from uipe_merge.errors import IncompatibleModelsError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from uipe_merge.progress import Progress
    from uipe_merge.recipe import Recipe
    from uipe_merge.searching import PlannedSearch
    from uipe_merge.study.examination import Examination
    from uipe_merge.study.metrics import Floats
    from uipe_merge.study.reference import Reference
    from uipe_merge.study.trials import Point


class MovedModel:
    """θᵤ + α·(θᵤ − θ₀) for one recipe after the other; one model at a time."""

    def __init__(self, planned: PlannedSearch, threads: int | None) -> None:
        """Remember what is loaded, when it is asked for."""
        self._planned = planned
        self._threads = threads
        self._model: PreTrainedModel | None = None

    def at(self, recipe: Recipe) -> PreTrainedModel:
        """Return the model of a recipe; the one returned before is that model now.

        Raises:
            NumericError: A value would not be finite; the model is as it was before.
            UipeMergeError: Whatever ``load`` and ``set_alpha`` refuse.
        """
        from uipe_merge import loading
        from uipe_merge.study.models import quiet

        if self._model is not None:
            try:
                loading.set_alpha(self._model, recipe=recipe)
            except IncompatibleModelsError:  # it would be untied: that is another model
                self._model = None
        if self._model is None:
            with quiet():
                self._model = loading.load(
                    self._planned.original,
                    self._planned.unlearned,
                    recipe=recipe,
                    allow_pickle=self._planned.allow_pickle,
                    dequantize=self._planned.dequantize,
                    threads=self._threads,
                )
        self._model.eval()
        return self._model


class CallableEvaluator:
    """Scores that a function of a model returns."""

    def __init__(
        self,
        planned: PlannedSearch,
        function: Callable[[PreTrainedModel], Mapping[str, float]],
        threads: int | None,
    ) -> None:
        """Prepare to load the model and to give it to ``function``."""
        self._moved = MovedModel(planned, threads)
        self._function = function

    @property
    def identity(self) -> dict[str, object]:
        """What tells its scores from others: its attribute ``identity``, or else its name."""
        kind = type(self._function)
        module, name = (
            getattr(self._function, part, getattr(kind, part))
            for part in ("__module__", "__qualname__")
        )
        return {"function": getattr(self._function, "identity", f"{module}.{name}")}

    @property
    def description(self) -> dict[str, object]:
        """What the study says of it."""
        return self.identity

    def __call__(self, point: Point) -> Mapping[str, float]:
        """Return the scores of one model."""
        return self._function(self._moved.at(point.recipe))


class QuestionEvaluator:
    """Scores of the questions of ``evaluate``, called as ``collect`` calls them."""

    def __init__(
        self,
        planned: PlannedSearch,
        asked: Examination,
        reference: Reference | None,
        progress: Callable[[], Progress],
        threads: int | None,
    ) -> None:
        """Look at what can be looked at before a model is loaded.

        Args:
            planned: The search; the tokenizer of its winner is that of every trial.
            asked: The questions, and how they are asked.
            reference: The retain-only model, if there is one. It is asked once, before the other
                model is in memory, and its truth ratios are kept beside the trials.
            progress: Makes what is told of one evaluation.
            threads: As for ``load``.

        Raises:
            UsageError: The libraries of the extra ``study`` are missing.
            UipeMergeError: The reference is no model.
        """
        from uipe_merge.study.evaluate import check_installed
        from uipe_merge.study.reference import stamps

        check_installed()
        self._moved = MovedModel(planned, threads)
        self._planned = planned
        self._asked = asked
        self._reference = reference
        self._progress = progress
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.identity: dict[str, object] = {
            **asked.identity,
            "reference": None if reference is None else reference.identity,
            "tokenizer": stamps(planned.planned.sidecars),
        }

    @property
    def description(self) -> dict[str, object]:
        """What the study says of it."""
        reference = self._reference
        named = None if reference is None else reference.name or "truth ratios"
        return {**self._asked.identity, "reference": named}

    @property
    def score_names(self) -> list[str]:
        """What the scores are called."""
        return self._asked.score_names(compared=self._reference is not None)

    def __call__(self, point: Point) -> dict[str, float]:
        """Return the scores of one model; NaN of one that is broken.

        Raises:
            UipeMergeError: Whatever ``MovedModel.at`` and ``evaluate`` refuse.
        """
        from uipe_merge import fetching
        from uipe_merge.study import evaluate, models
        from uipe_merge.study.layouts import own_scores

        ratios = self._ratios()
        model = self._moved.at(point.recipe)
        if self._tokenizer is None:
            job = self._planned.planned
            fetching.fetch(job.wanted, job.pair)  # loading the model has done most of it
            self._tokenizer = models.load_tokenizer(job)
        found = evaluate.examine(model, self._tokenizer, self._asked, ratios, self._progress())
        return dict.fromkeys(self.score_names, math.nan) | own_scores(found.as_dict())

    def _ratios(self) -> Sequence[float] | Floats | None:
        from uipe_merge.study.workplace import keep_reference, kept_reference

        if self._reference is None or self._reference.known is not None:
            return None if self._reference is None else self._reference.known
        place = self._planned.place
        kept = kept_reference(place, self.identity)
        if kept is None:
            kept = self._reference.truth_ratios(self._asked, self._progress()).tolist()
            keep_reference(place, self.identity, kept)
        return kept
