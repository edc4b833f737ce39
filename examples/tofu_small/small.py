"""A small Llama and how it is trained: tokenizer, model, batches, steps."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any, NamedTuple

# Before torch and tokenizers are loaded: both are told to do the same thing every time.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import shared
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.utils import logging

from uipe_merge.study.prompts import Encoded, Prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

IGNORED = -100  # what cross_entropy leaves out
BEGIN, END = "<s>", "</s>"

ATTENTION = "eager" if torch.cuda.is_available() else "sdpa"
"""The faster one on a GPU has a gradient that differs from run to run."""


class Size(NamedTuple):
    """The shape of a Llama."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int


SIZES = {"small": Size(2048, 192, 512, 4, 6), "tiny": Size(320, 32, 64, 2, 2)}
POSITIONS = 512
POOL = 8


def prepare(seed: int) -> str:
    """Seed everything that draws, ask for deterministic kernels, and return the device."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    # It would fill every new tensor, to make bugs repeatable that are not looked for here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_tokenizer(texts: Sequence[str], vocabulary: int) -> FastTokenizer:
    """Train a byte-level BPE tokenizer on texts; every text then begins with ``<s>``."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)]
    )
    return FastTokenizer(tokenizer_object=inner, bos_token=BEGIN, eos_token=END)


def make_model(size: Size, vocabulary: int) -> LlamaForCausalLM:
    """Return a Llama with random weights."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        attn_implementation=ATTENTION,
    )
    return LlamaForCausalLM(config)


def load(directory: Path, device: str) -> Any:  # noqa: ANN401 - a model of transformers
    """Load a model that one of the scripts saved."""
    if not directory.is_dir():
        shared.stop(f"{directory}: no such model; run the step that makes it first")
    model = AutoModelForCausalLM.from_pretrained(
        directory, local_files_only=True, attn_implementation=ATTENTION
    )
    return model.to(device)


def load_tokenizer(directory: Path) -> FastTokenizer:
    """Load the tokenizer beside a model."""
    found: FastTokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return found


def save(model: LlamaForCausalLM, tokenizer: FastTokenizer, directory: Path) -> None:
    """Save model and tokenizer; the directory appears when all of it is written."""
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(directory)


def encode(tokenizer: FastTokenizer, records: Sequence[shared.Record]) -> list[Encoded]:
    """Return questions with their answers as tokens, in the words that evaluate uses too."""
    prompts = Prompts(tokenizer)
    return [prompts.answered(record["question"], record["answer"]) for record in records]


class Batch(NamedTuple):
    """Sequences padded on the right, shape (n, length).

    Attributes:
        ids: Tokens.
        mask: 1 where they are.
        labels: Tokens to be predicted; ``IGNORED`` elsewhere.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


def batch(sequences: Sequence[Encoded], device: str, *, answers_only: bool) -> Batch:
    """Put sequences together; with ``answers_only`` the questions are not to be predicted."""
    width = max(len(each.ids) for each in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, each in enumerate(sequences):
        end, start = len(each.ids), each.start if answers_only else 1
        ids[row, :end] = torch.tensor(each.ids)
        mask[row, :end] = 1
        labels[row, start:end] = ids[row, start:end]
    return Batch(ids.to(device), mask.to(device), labels.to(device))


def draws(sequences: Sequence[Encoded], size: int, seed: int) -> Iterator[list[Encoded]]:
    """Yield batches for ever, each round all sequences in a random order.

    Of ``POOL`` batches that are drawn, each gets sequences of about one length: less padding.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(sequences), generator=generator).tolist()
        for first in range(0, len(order), POOL * size):
            pool = sorted(
                order[first : first + POOL * size], key=lambda row: len(sequences[row].ids)
            )
            starts = range(0, len(pool), size)
            for place in torch.randperm(len(starts), generator=generator).tolist():
                yield [sequences[row] for row in pool[starts[place] : starts[place] + size]]


def logits_of(model: LlamaForCausalLM, given: Batch) -> torch.Tensor:
    """Return the logits of each token's successor, shape (n, length − 1, vocabulary)."""
    found: torch.Tensor = model(
        input_ids=given.ids, attention_mask=given.mask, use_cache=False
    ).logits[:, :-1]
    return found


def token_losses(logits: torch.Tensor, given: Batch) -> torch.Tensor:
    """Return the loss of every token, shape (n, length − 1); 0 where none is to be predicted."""
    labels = given.labels[:, 1:]
    losses = functional.cross_entropy(
        logits.flatten(0, 1), labels.reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(labels)


def mean_loss(logits: torch.Tensor, given: Batch) -> torch.Tensor:
    """Return the mean loss of the tokens that are to be predicted."""
    return token_losses(logits, given).sum() / (given.labels[:, 1:] != IGNORED).sum()


def optimise(
    model: LlamaForCausalLM,
    steps: int,
    rate: Callable[[int], float],
    loss_of: Callable[[int], torch.Tensor],
    after: Callable[[int], None] = lambda _: None,
) -> float:
    """Take steps of AdamW and return the last loss.

    Args:
        model: What is trained.
        steps: How many steps.
        rate: The learning rate of a step, from 0.
        loss_of: The loss of a step.
        after: Called after each step with the number of steps that were taken.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate(0), weight_decay=0.01, fused=True)
    last = float("nan")
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate(step)
        loss = loss_of(step)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        last = float(loss.detach())
        after(step + 1)
    return last
