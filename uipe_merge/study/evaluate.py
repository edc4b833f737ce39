"""The whole of TOFU's evaluation on a loaded model: forget quality, model utility, fluency."""

from __future__ import annotations

import importlib.util
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from uipe_merge.errors import UsageError
from uipe_merge.progress import Silent
from uipe_merge.study import metrics, scoring
from uipe_merge.study.examination import BATCH_SIZE, MAX_NEW_TOKENS
from uipe_merge.study.metrics import KsResult
from uipe_merge.study.models import quiet
from uipe_merge.study.prompts import Prompts
from uipe_merge.study.scores import FORGET, Evaluation, Split, utility_splits

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy.typing as npt
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from uipe_merge.progress import Progress
    from uipe_merge.study.examination import Examination
    from uipe_merge.study.metrics import Floats
    from uipe_merge.study.prompts import Encoded
    from uipe_merge.study.questions import Question

RETAIN = "retain"
_SEED = 0  # of the bootstrap: the same evaluation gives the same interval
_LIBRARIES = ("scipy", "rouge_score")


def evaluate(  # noqa: PLR0913 - one keyword-only argument an option of the evaluation
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    forget: Sequence[Question],
    retain: Sequence[Question] = (),
    utility: Mapping[str, Sequence[Question]] | None = None,
    reference: npt.ArrayLike | None = None,
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int = MAX_NEW_TOKENS,
    device: str = "auto",
    template: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a model as TOFU does.

    Greedy and seeded: the same call gives the same result, and another batch size changes it
    by rounding only.

    Args:
        model: A causal language model; it is moved to ``device`` and put in evaluation mode.
        tokenizer: Its tokenizer.
        forget: Questions to be forgotten.
        retain: Questions to be kept.
        utility: The other splits of model utility: ``real_authors`` and ``world_facts``.
        reference: Truth ratios of a retain-only model on the same forget questions, shape (m,).
        batch_size: Sequences that go through the model at once.
        max_new_tokens: Tokens after which an answer is cut off.
        device: ``cpu``, ``cuda``, or ``auto`` for the second where it is available.
        template: The prompt, as for ``Prompts``.
        progress: Told of every sequence scored and every answer generated.

    Raises:
        UsageError: A split, the template, the device or a length makes no sense, or the
            libraries of the extra ``study`` are missing.
    """
    check_installed()
    given = {FORGET: forget, RETAIN: retain, **(utility or {})}
    if unknown := set(given) - {FORGET, *metrics.UTILITY_SPLITS}:
        raise UsageError(f"no such split: {', '.join(sorted(unknown))}")
    if not forget:
        raise UsageError("the forget split has no questions")
    given = {name: questions for name, questions in given.items() if questions}
    runner = _Runner(model, tokenizer, template, batch_size, device)
    splits = runner.run(given, max_new_tokens, progress or Silent())
    values = {name: splits[name].values() for name in utility_splits(splits)}
    kept = {name: splits[name].means() for name in values}
    generator = np.random.default_rng(_SEED)
    return Evaluation(
        splits,
        None if reference is None else _compare(splits[FORGET].truth_ratios, reference),
        metrics.model_utility(kept) if kept else None,
        metrics.bootstrap_interval(values, generator) if kept else None,
        runner.prompts.template,
    )


def examine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Examination,
    reference: npt.ArrayLike | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a model by what an examination says; see ``evaluate``."""
    with quiet():
        return evaluate(
            model,
            tokenizer,
            forget=asked.forget,
            retain=asked.retain,
            utility=asked.utility,
            reference=reference,
            batch_size=asked.batch_size,
            max_new_tokens=asked.max_new_tokens,
            device=asked.device,
            template=asked.template,
            progress=progress,
        )


def reference_truth_ratios(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[Question],
    *,
    batch_size: int = BATCH_SIZE,
    device: str = "auto",
    template: str | None = None,
    progress: Progress | None = None,
) -> Floats:
    """Return the truth ratios of a retain-only model on the forget split, and nothing else.

    The arguments are those of ``evaluate``; the result is its ``reference``, shape (m,).
    """
    runner = _Runner(model, tokenizer, template, batch_size, device)
    return runner.truth_ratios(forget, progress or Silent())


def check_installed() -> None:
    """Refuse an evaluation that would fail at its end.

    Raises:
        UsageError: A library of the extra ``study`` is not installed.
    """
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"an evaluation needs {' and '.join(missing)}",
            remedy="install it with `pip install 'uipe-merge[study]'`",
        )


class _Runner:
    """A model on its device, with all that stays the same from split to split."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        batch_size: int,
        device: str,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch size {batch_size} is less than 1")
        self.prompts = Prompts(tokenizer, template)
        self._model = model.to(_device(device))
        self._model.eval()
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        # A chat model may end its turn with another token than its tokenizer ends a text with.
        own = model.generation_config.eos_token_id if model.generation_config else None
        ends = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
        self._ends = list(dict.fromkeys(end for end in ends if end is not None))

    def run(
        self, splits: Mapping[str, Sequence[Question]], max_new_tokens: int, progress: Progress
    ) -> dict[str, Split]:
        """Score every split: losses first, then generated answers."""
        # Everything is looked at before anything is run, so that it fails early if at all.
        answers = {name: self._answers(questions) for name, questions in splits.items()}
        prompts = {
            name: [self.prompts.prompt(question.question) for question in questions]
            for name, questions in splits.items()
        }
        every = [len(prompt) for name in prompts for prompt in prompts[name]]
        scoring.check_lengths(self._model, max(every), max_new_tokens)
        total = len(every) + sum(len(rows) for split in answers.values() for rows in split)
        found = {}
        with _shown(progress, total):
            for name, questions in splits.items():
                losses = self._losses(answers[name], name, progress)
                tokens = scoring.greedy(
                    self._model,
                    prompts[name],
                    ends=self._ends,
                    batch_size=self._batch_size,
                    max_new_tokens=max_new_tokens,
                    tick=partial(_advance, progress, f"{name}: answers"),
                )
                found[name] = self._split(name, questions, losses, tokens)
        return found

    def truth_ratios(self, questions: Sequence[Question], progress: Progress) -> Floats:
        """Score one split by its losses alone."""
        answers = self._answers(questions)
        with _shown(progress, sum(map(len, answers))):
            losses = self._losses(answers, "reference", progress)
        return _truth_ratios(losses)

    def _answers(self, questions: Sequence[Question]) -> list[list[Encoded]]:
        """Return of each question: the answer, the paraphrased one, and the wrong ones."""
        answers = []
        for question in questions:
            paraphrased = question.paraphrased_answer or question.answer
            texts = [question.answer, paraphrased, *question.perturbed_answers]
            answers.append([self.prompts.answered(question.question, text) for text in texts])
        longest = max(len(sequence.ids) for row in answers for sequence in row)
        scoring.check_lengths(self._model, longest)
        return answers

    def _losses(
        self, answers: Sequence[Sequence[Encoded]], name: str, progress: Progress
    ) -> list[Floats]:
        """Return the losses in the shape of ``_answers``."""
        flat = [sequence for row in answers for sequence in row]
        tick = partial(_advance, progress, f"{name}: losses")
        losses = scoring.mean_losses(self._model, flat, self._batch_size, tick)
        return np.split(losses, np.cumsum([len(row) for row in answers])[:-1])

    def _split(
        self,
        name: str,
        questions: Sequence[Question],
        losses: Sequence[Floats],
        tokens: Sequence[Sequence[int]],
    ) -> Split:
        texts = tuple(
            self._tokenizer.decode(list(ids), skip_special_tokens=True).strip() for ids in tokens
        )
        own = np.array([row[0] for row in losses])
        return Split(
            own,
            _truth_ratios(losses),
            metrics.probabilities(own)
            if name in {FORGET, RETAIN}
            else metrics.normalised_probabilities(own, [row[2:] for row in losses]),
            metrics.rouge_l_recalls(texts, [question.answer for question in questions]),
            texts,
            # An answer of special tokens only is as silent as an empty one.
            np.array(
                [
                    metrics.distinct_share(ids) if text else 0.0
                    for ids, text in zip(tokens, texts, strict=True)
                ]
            ),
        )


def _truth_ratios(losses: Sequence[Floats]) -> Floats:
    return metrics.truth_ratios([row[1] for row in losses], [row[2:] for row in losses])


def _compare(ratios: Floats, reference: npt.ArrayLike) -> KsResult:
    if np.isnan(ratios).any():  # the model is broken: a result of the evaluation, no error
        return KsResult(np.nan, np.nan, len(ratios), np.size(reference))
    return metrics.forget_quality(ratios, reference)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device here", remedy="choose the device cpu")
    return torch.device(name)


@contextmanager
def _shown(progress: Progress, total: int) -> Iterator[None]:
    progress.start(total)
    try:
        yield
    except torch.OutOfMemoryError:
        raise UsageError(
            "the device has too little memory", remedy="choose a smaller batch size"
        ) from None
    finally:
        progress.close()


def _advance(progress: Progress, what: str, count: int) -> None:
    progress.advance(count, what)
