"""The model type ``uipe`` of lm-evaluation-harness: a model at any α, evaluated without writing it.

lm_eval (read at 0.4.13) looks for models in one registry that imports fill; it reads no entry
points, and ``--include_path`` is for tasks. So this module registers the type when imported:
``uipe-merge lm-eval`` does that and hands over, and in Python it is
``import uipe_merge.integrations.lm_eval`` before ``lm_eval.simple_evaluate(model="uipe", …)``.

What is not about the checkpoints (device, batches, lengths, chat template, accelerate's processes)
is lm_eval's own ``hf`` model, which this one is. Its configuration and tokenizer are read from the
files that ``merge`` would put beside the weights, so that both see the same model.
"""

from __future__ import annotations

import logging
import os
import shlex
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from uipe_merge import api
from uipe_merge._version import __version__
from uipe_merge.checkpoint.hub import parse_id
from uipe_merge.errors import IncompatibleModelsError, UsageError
from uipe_merge.finishing import config_edits
from uipe_merge.integrations.lm_eval_arguments import NAME, check
from uipe_merge.loading import load
from uipe_merge.output.filesystem import LocalFileSystem
from uipe_merge.output.sidecars import Edits, copy_sidecar

if TYPE_CHECKING:
    from uipe_merge.job import Job
    from uipe_merge.loading import Extrapolation

PathLike = str | os.PathLike[str]


@register_model(NAME)
class UipeLM(HFLM):  # type: ignore[misc]  # lm_eval is not analysed
    """θᵤ + α·(θᵤ − θ₀) for lm_eval; its answers are those of what ``merge`` writes.

    ``model.set_alpha`` moves it to another α where it lies, as with ``load``.

    Args:
        original: The original checkpoint θ₀.
        unlearned: The unlearned checkpoint θᵤ.
        alpha: α, unless there is a recipe.
        arguments: The others of ``check``.

    Raises:
        UsageError: An argument makes no sense, or the device cannot be used.
        IncompatibleModelsError: transformers cannot make the model or its tokenizer.
        UipeMergeError: Whatever ``merge`` would refuse.
    """

    def __init__(
        self,
        original: PathLike | None = None,
        unlearned: PathLike | None = None,
        alpha: float | str | None = None,
        **arguments: Any,  # noqa: ANN401 - those of check
    ) -> None:
        self._asked = check(original, unlearned, alpha, **arguments)
        with TemporaryDirectory(prefix="uipe-merge-") as directory:
            self._job = api.plan(
                cast("PathLike", original),
                cast("PathLike", unlearned),
                Path(directory) / "model",  # never written
                recipe=self._asked.recipe,
                allow_pickle=self._asked.allow_pickle,
                dequantize=self._asked.dequantize,
            )
            _carry(self._job, Path(directory))
            super().__init__(pretrained=directory, **self._asked.options)
        self.pretrained = self._job.arguments[1]
        if "tokenizer" not in self._asked.options:
            # A part of lm_eval's keys to cached requests, which may outlive a temporary directory.
            self.tokenizer.name_or_path = self.pretrained

    def _get_config(self, pretrained: str, **options: object) -> None:
        if not (Path(pretrained) / "config.json").is_file():
            raise IncompatibleModelsError(
                "has no config.json, so nothing says what model it is", file=self._job.arguments[1]
            )
        try:
            super()._get_config(pretrained, **options)
        except (ValueError, OSError, KeyError) as error:
            raise self._unmade("configuration", error) from error

    def _create_tokenizer(
        self, pretrained: str, tokenizer: object = None, **options: object
    ) -> None:
        try:
            super()._create_tokenizer(pretrained, tokenizer, **options)
        except Exception as error:  # whatever its files provoke in there
            named = tokenizer if isinstance(tokenizer, str) else None
            raise self._unmade("tokenizer", error, named) from error

    def _create_model(self, pretrained: str, **_: object) -> None:  # noqa: ARG002 - has no weights
        import torch

        unusable = (RuntimeError, AssertionError)  # out of memory too; torch built without it
        try:
            torch.empty(1, device=self.device)  # before minutes are spent on the model
        except unusable as error:
            raise _unusable(self.device, error) from error
        model = load(
            *self._job.arguments,
            recipe=self._asked.recipe,
            allow_pickle=self._asked.allow_pickle,
            dequantize=self._asked.dequantize,
            threads=self._asked.threads,
            model_class=self.AUTO_MODEL_CLASS,
            **self._asked.making,
        )
        record: Extrapolation = model.uipe_extrapolation
        for warning in record.warnings:
            logging.getLogger(__name__).warning(warning)
        try:
            self._model = model.to(self.device)
        except unusable as error:
            raise _unusable(self.device, error) from error

    def get_model_info(self) -> dict[str, object]:
        """Return what lm_eval writes into its results beside the arguments.

        α is that of the model as it is now, and ids of a hub are with their commits.
        """
        recipe = self.model.uipe_extrapolation.recipe
        original, unlearned = self._job.arguments
        named = parse_id(unlearned)
        commit = "" if named is None else named.revision or ""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": self.model.dtype,
            "model_revision": commit,
            "model_sha": commit,
            "original": original,
            "unlearned": unlearned,
            "alpha": recipe.alpha,
            "recipe": shlex.join(recipe.words(lambda name: self._job.names.get(name, name))),
            "uipe_merge_version": __version__,
        }

    def _unmade(
        self, what: str, error: Exception, file: str | None = None
    ) -> IncompatibleModelsError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return IncompatibleModelsError(
            f"transformers cannot read its {what}: {reason}",
            file=file or self._job.arguments[1],
            remedy=f"check its {what} files",
        )


def _carry(job: Job, directory: Path) -> None:
    """Put what ``merge`` would put beside the weights into a directory."""
    for wanted in job.wanted:
        wanted.folder.fetch(sorted(wanted.others))
    edits = config_edits(job)
    for sidecar in job.sidecars:
        copy_sidecar(LocalFileSystem(), sidecar, directory, edits.get(sidecar.name, Edits()))


def _unusable(device: object, error: BaseException) -> UsageError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UsageError(
        f"the model cannot go to {device}: {reason}", remedy="choose another --device"
    )
