"""A checkpoint directory becomes a model and its tokenizer: local files, nobody's code."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from uipe_merge.checkpoint.model import open_checkpoint
from uipe_merge.checkpoint.storage import LocalFolder
from uipe_merge.errors import CorruptInputError, IncompatibleModelsError, listed
from uipe_merge.output.manifest import MANIFEST_NAME
from uipe_merge.study.questions import read_bytes

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        model, details = AutoModelForCausalLM.from_pretrained(
            folder.root,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            folder.root, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # noqa: BLE001 - whatever config and tokenizer files provoke in there
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise IncompatibleModelsError(
            f"transformers cannot load it: {reason}",
            file=path,
            remedy="check its config and tokenizer files",
        ) from None
    if missing := sorted(map(str, details["missing_keys"])):
        raise CorruptInputError(
            f"lacks weights of its own architecture: {listed(missing)}",
            file=path,
            remedy="download the checkpoint again",
        )
    return model, tokenizer


def manifest_sha256(path: str | os.PathLike[str]) -> str | None:
    """Return the hex SHA-256 of a model's ``uipe_merge.json``, or None where there is none."""
    manifest = Path(path) / MANIFEST_NAME
    return hashlib.sha256(read_bytes(manifest)).hexdigest() if manifest.is_file() else None
