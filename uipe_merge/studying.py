"""``evaluate`` and ``search`` for notebooks and scripts; heavy imports when they are called."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from uipe_merge.errors import UsageError
from uipe_merge.progress import watcher
from uipe_merge.study.examination import BATCH_SIZE, MAX_NEW_TOKENS, make_examination
from uipe_merge.study.search import TRIALS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from uipe_merge.progress import Progress
    from uipe_merge.recipe import Recipe
    from uipe_merge.searching import SearchReport
    from uipe_merge.study.questions import Questions
    from uipe_merge.study.reference import ReferenceLike
    from uipe_merge.study.sampling import Sampler
    from uipe_merge.study.scores import Evaluation

PathLike = str | os.PathLike[str]

_UNIT = " sequences"


def evaluate(  # noqa: PLR0913 - one keyword-only argument an option of the evaluation
    model: PreTrainedModel | PathLike,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    forget: Questions,
    retain: Questions = (),
    real_authors: Questions | None = None,
    world_facts: Questions | None = None,
    reference: ReferenceLike | None = None,
    retain_logs: PathLike | None = None,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int = MAX_NEW_TOKENS,
    device: str = "auto",
    template: str | None = None,
    progress: bool | Progress = True,
) -> Evaluation:
    """Evaluate a model as TOFU does: what it forgot, and what it still can do.

    Greedy and seeded. Needs the extra ``study``.

    Args:
        model: A directory; or a model in memory, which is moved to ``device`` and put in
            evaluation mode.
        tokenizer: Of a model in memory; of a directory, in place of its own.
        forget: Questions to be forgotten: a file of JSON or JSON lines, or a list of such
            records or of ``Question``.
        retain: Questions to be kept, likewise; without them model utility has fewer parts.
        real_authors: TOFU's questions on real authors, for model utility.
        world_facts: TOFU's questions on the world, for model utility.
        reference: The directory of a retain-only model, or its truth ratios, for forget quality.
        retain_logs: Its evaluation instead: a log of TOFU, a ``TOFU_EVAL.json`` or a
            ``scores.json``.
        limit: Use the first so many questions of each split.
        batch_size: Sequences that go through the model at once.
        max_new_tokens: Tokens after which an answer is cut off.
        device: ``cpu``, ``cuda``, or ``auto`` for the second where it is available.
        template: The prompt, with ``{q}`` and, at its end, ``{a}``; by default the tokenizer's
            chat template, or question and answer on a line each.
        progress: Show a tqdm bar; or an object to be told of the progress.

    Returns:
        The scores by question, and what they come to; ``as_dict()`` is what the command writes.

    Raises:
        UsageError: Something is not there, makes no sense or is not installed; a model in memory
            comes without its tokenizer.
        CorruptInputError: A file is not what it should be.
        IncompatibleModelsError: transformers cannot load a model.
        OutputError: A file cannot be read.
    """
    from uipe_merge.study.reference import make_reference

    compared = make_reference(reference, retain_logs)
    asked = make_examination(
        forget=forget,
        retain=retain,
        real_authors=real_authors,
        world_facts=world_facts,
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        device=device,
        template=template,
    )
    from uipe_merge.study import evaluate as study
    from uipe_merge.study import models

    study.check_installed()
    if not isinstance(model, str | os.PathLike) and tokenizer is None:
        raise UsageError("a model in memory is asked by way of its tokenizer", remedy="give it")
    ratios = None
    if compared is not None:
        ratios = compared.truth_ratios(asked, watcher(progress, _UNIT))
    if isinstance(model, str | os.PathLike):
        model, own = models.load(model)
        tokenizer = tokenizer or own
    return study.examine(model, tokenizer, asked, ratios, watcher(progress, _UNIT))


def search(  # noqa: PLR0913 - one keyword-only argument a choice of the search
    original: PathLike,
    unlearned: PathLike,
    output: PathLike,
    *,
    evaluate: Callable[[PreTrainedModel], Mapping[str, float]] | None = None,
    forget: Questions | None = None,
    retain: Questions | None = None,
    real_authors: Questions | None = None,
    world_facts: Questions | None = None,
    reference: ReferenceLike | None = None,
    retain_logs: PathLike | None = None,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    max_new_tokens: int = MAX_NEW_TOKENS,
    device: str = "auto",
    template: str | None = None,
    maximise: str | None = None,
    minimise: str | None = None,
    subject_to: str | Sequence[str] = (),
    alphas: tuple[float, float] = (0, 4),
    per_layer_groups: int | None = None,
    trials: int = TRIALS,
    sampler: Sampler = "tpe",
    seed: int = 0,
    recipe: Recipe | PathLike | None = None,
    work: PathLike | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    dequantize: bool = False,
    threads: int | None = None,
    progress: bool | Progress = True,
) -> SearchReport:
    """Search for the α with the best score among those that keep enough; write that model.

    One model is in memory and moved from α to α; the disk holds the trials and, at the end, the
    winner, as ``merge`` would write it. The same call goes on where one was stopped, and with
    more trials where one ended.

    Args:
        original: As for ``merge``.
        unlearned: As for ``merge``.
        output: Directory to make, of the best model.
        evaluate: Is given the model, of transformers and in evaluation mode, and returns its
            scores by name, NaN where there is none. It may move the model to a device, and must
            not replace its parameters. Trials of an earlier call are taken for its own as long as
            its attribute ``identity`` (plain values), or else its name, is the same: with another
            function of the same name give another ``work``.
        forget: Instead of that, questions to be forgotten, as for ``evaluate``; needs the extra
            ``study``. The scores are ``forget_quality``, ``model_utility``,
            ``forget_probability``, ``forget_rouge``, ``retain_probability`` and so on.
        retain: As for ``evaluate``, as is everything up to ``template``.
        real_authors: Questions on real authors.
        world_facts: Questions on the world.
        reference: The directory of a retain-only model, or its truth ratios.
        retain_logs: Its evaluation instead.
        limit: Use the first so many questions of each split.
        batch_size: Sequences that go through the model at once.
        max_new_tokens: Tokens after which an answer is cut off.
        device: Where the questions are asked.
        template: The prompt.
        maximise: The score to look for; of questions by default ``forget_quality``.
        minimise: Instead of that, a score of which less is better.
        subject_to: What the model has to keep, one constraint or several, as
            ``'model_utility>=0.95*unlearned'``, which is the default of questions. One at least
            on another score: nothing is chosen on forget quality alone.
        alphas: The least and the largest α.
        per_layer_groups: An α each at so many layers, linear between; needs Optuna.
        trials: Evaluations at most, those of earlier calls included.
        sampler: What searches for several α: ``tpe``, ``nsga2`` or ``gp``.
        seed: Of that.
        recipe: All else, as an object or in a file; with layers, its α is that of what they leave.
        work: Where the trials are; by default ``OUTPUT.search``.
        overwrite: As for ``merge``.
        allow_pickle: As for ``merge``.
        dequantize: As for ``merge``.
        threads: As for ``merge``.
        progress: Show a tqdm bar of every evaluation and of the merge; or an object that is told.

    Returns:
        The report; its ``best`` and ``output`` are None where no model meets every constraint.

    Raises:
        UsageError: Neither or both of ``evaluate`` and ``forget`` were given, nothing is searched
            for, forget quality has nothing to compare with, or the trials are of another search.
        RecipeError: A constraint cannot be understood, or an α cannot be used.
        UipeMergeError: Whatever ``load``, ``evaluate`` or ``merge`` would refuse.
    """
    from uipe_merge import searching
    from uipe_merge.api import make_recipe
    from uipe_merge.in_memory import CallableEvaluator, QuestionEvaluator
    from uipe_merge.recipe import Recipe
    from uipe_merge.study import aims
    from uipe_merge.study.reference import make_reference

    kept = [subject_to] if isinstance(subject_to, str) else list(subject_to)
    files = (forget, retain, real_authors, world_facts, reference, retain_logs, limit, template)
    options = (batch_size, max_new_tokens, device) != (BATCH_SIZE, MAX_NEW_TOKENS, "auto")
    told = any(each is not None for each in files) or options
    if evaluate is not None and told:
        raise UsageError(
            "evaluate and forget are two ways to evaluate",
            remedy="leave out the function, or the questions and their options",
        )
    if evaluate is None and forget is None:
        raise UsageError("nothing gives the scores", remedy="give evaluate, or forget and retain")
    planned = searching.plan_search(
        original,
        unlearned,
        output,
        Recipe(0.0) if recipe is None else make_recipe(alpha=None, recipe=recipe),
        alphas=alphas,
        per_layer_groups=per_layer_groups,
        work=work,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
        dequantize=dequantize,
    )
    evaluator: CallableEvaluator | QuestionEvaluator
    if evaluate is not None:
        sought = aims.aim(maximise, minimise, kept)
        evaluator = CallableEvaluator(planned, evaluate, threads)
    else:
        compared = make_reference(reference, retain_logs)
        sought = aims.aim_of_questions(maximise, minimise, kept, compared=compared is not None)
        asked = make_examination(
            forget=forget or (),
            retain=retain or (),
            real_authors=real_authors,
            world_facts=world_facts,
            limit=limit,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            device=device,
            template=template,
        )
        evaluator = QuestionEvaluator(
            planned, asked, compared, lambda: watcher(progress, _UNIT), threads
        )
        sought.require(evaluator.score_names)
    return searching.run_search(
        planned,
        evaluator,
        sought,
        trials=trials,
        sampler=sampler,
        seed=seed,
        threads=threads,
        tell=lambda _: None,
        progress=lambda: watcher(progress),
    )
