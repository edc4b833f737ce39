"""A checkpoint directory becomes a model and its tokenizer: local files, nobody's code."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from uipe_merge.checkpoint.model import open_checkpoint
from uipe_merge.checkpoint.storage import LocalFolder
from uipe_merge.errors import CorruptInputError, IncompatibleModelsError, UipeMergeError, listed
from uipe_merge.finishing import config_edits
from uipe_merge.output.filesystem import LocalFileSystem
from uipe_merge.output.manifest import MANIFEST_NAME
from uipe_merge.output.sidecars import Edits, copy_sidecar
from uipe_merge.study.questions import read_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from uipe_merge.job import Job


def load(path: str | os.PathLike[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in the dtype that it is stored in, and its tokenizer.

    The headers are read first, as for a merge: transformers would follow a shard out of the
    directory, and make up at random what a damaged checkpoint lacks.

    Raises:
        UsageError: There is no such directory.
        CorruptInputError: A file is damaged, or a weight is missing.
        UnsafeInputError: Its weights are pickled, or lie outside of it.
        IncompatibleModelsError: It is not a model that transformers can load by itself.
        OutputError: A file cannot be read.
    """
    folder = LocalFolder(path)
    checkpoint = open_checkpoint(folder)
    if "adapter_config.json" in checkpoint.names:
        raise IncompatibleModelsError(
            "holds an adapter beside the model, and would load as that",
            file=path,
            remedy="remove adapter_config.json, or merge the adapter first",
        )
    with quiet(), _loading(path):
        model, details = AutoModelForCausalLM.from_pretrained(
            folder.root,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer = _tokenizer(folder.root)
    if missing := sorted(map(str, details["missing_keys"])):
        raise CorruptInputError(
            f"lacks weights of its own architecture: {listed(missing)}",
            file=path,
            remedy="download the checkpoint again",
        )
    return model, tokenizer


def load_tokenizer(job: Job) -> PreTrainedTokenizerBase:
    """Return the tokenizer that the output of a merge would have; its files must be here.

    Raises:
        IncompatibleModelsError: transformers cannot load it.
        OutputError: A file cannot be read or copied.
    """
    filesystem, edits = LocalFileSystem(), config_edits(job)
    with TemporaryDirectory(prefix="uipe-merge-") as name, quiet():
        for sidecar in job.sidecars:
            copy_sidecar(filesystem, sidecar, Path(name), edits.get(sidecar.name, Edits()))
        with _loading(job.arguments[1]):
            return _tokenizer(name)


def _tokenizer(directory: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


@contextmanager
def _loading(path: object) -> Iterator[None]:
    try:
        yield
    except UipeMergeError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever config and tokenizer files provoke in there
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise IncompatibleModelsError(
            f"transformers cannot load it: {reason}",
            file=path,
            remedy="check its config and tokenizer files",
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from talking while it loads; it is left as it was."""
    shown, level = (
        transformers_logging.is_progress_bar_enabled(),
        transformers_logging.get_verbosity(),
    )
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()


def manifest_sha256(path: str | os.PathLike[str]) -> str | None:
    """Return the hex SHA-256 of a model's ``uipe_merge.json``, or None where there is none."""
    manifest = Path(path) / MANIFEST_NAME
    return hashlib.sha256(read_bytes(manifest)).hexdigest() if manifest.is_file() else None
