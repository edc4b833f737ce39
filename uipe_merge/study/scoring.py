"""What a model says to token sequences, in batches: losses of answers, and greedy answers."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional
from transformers import GenerationConfig

from uipe_merge.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel

    from uipe_merge.study.metrics import Floats
    from uipe_merge.study.prompts import Encoded

PADDING = 0
"""Any token of every vocabulary: padding is masked, and what comes of it is never looked at."""


def check_lengths(model: PreTrainedModel, longest: int, further: int = 0) -> None:
    """Refuse sequences that the model has no positions for.

    Args:
        model: The model.
        longest: Tokens of the longest sequence.
        further: Tokens that are to be generated after it.

    Raises:
        UsageError: There are more than the model takes.
    """
    most = getattr(model.config, "max_position_embeddings", None)
    if isinstance(most, int) and longest + further > most > 0:
        text = f"a question takes {longest} tokens and {further} new ones"
        raise UsageError(
            f"{text}, more than the {most} of the model"
            if further
            else f"a question and its answer take {longest} tokens, more than the {most} of the model",
            remedy="generate fewer tokens" if further else "leave that question out",
        )


@torch.no_grad()
def mean_losses(
    model: PreTrainedModel,
    sequences: Sequence[Encoded],
    batch_size: int,
    tick: Callable[[int], None],
) -> Floats:
    """Return the mean negative log-likelihood per token of each answer, in nats.

    Sequences are padded on the right: a causal model sees nothing to the right of a token, so
    padding changes no number beyond the rounding of another matrix shape.

    Args:
        model: A causal language model in evaluation mode.
        sequences: n questions with their answers.
        batch_size: How many go through the model at once.
        tick: Called with the size of each batch that is done.

    Returns:
        Shape (n,). The logits are as precise as the model, their logarithms are float32.
    """
    losses = np.empty(len(sequences))
    lengths = [len(sequence.ids) for sequence in sequences]
    for rows in _batches(lengths, batch_size):
        width = lengths[rows[0]]
        ids = torch.full((len(rows), width), PADDING)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : lengths[row]] = torch.tensor(sequences[row].ids)
            mask[place, : lengths[row]] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for place, row in enumerate(rows):
            start, end = sequences[row].start, lengths[row]
            # A row at a time: float32 copies of all logits of a batch would be gigabytes.
            predicted = logits[place, start - 1 : end - 1].float()
            losses[row] = functional.cross_entropy(predicted, ids[place, start:end]).item()
        tick(len(rows))
    return losses


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    ends: Sequence[int],
    batch_size: int,
    max_new_tokens: int,
    tick: Callable[[int], None],
) -> list[list[int]]:
    """Return the likeliest continuation of each prompt, token by token, up to its end.

    Prompts are padded on the left, so that each is continued where it ends. Nothing is drawn
    at random, and nothing that the model's generation config asks for (penalties, beams) is
    done: it could hide that the model repeats itself.

    Args:
        model: A causal language model in evaluation mode.
        prompts: n prompts as tokens.
        ends: The tokens that end a text; the one that does is not returned.
        batch_size: How many go through the model at once.
        max_new_tokens: Tokens after which a continuation is cut off.
        tick: Called with the size of each batch that is done.

    Returns:
        The new tokens of each prompt, n lists.
    """
    found: list[list[int]] = [[] for _ in prompts]
    lengths = [len(prompt) for prompt in prompts]
    with _plain_generation(model, ends, max_new_tokens):
        for rows in _batches(lengths, batch_size):
            width = lengths[rows[0]]
            ids = torch.full((len(rows), width), PADDING)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(rows):
                ids[place, width - lengths[row] :] = torch.tensor(prompts[row])
                mask[place, width - lengths[row] :] = 1
            whole = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device)
            )
            for row, new in zip(rows, whole[:, width:].tolist(), strict=True):
                end = next((at for at, token in enumerate(new) if token in ends), len(new))
                found[row] = new[:end]
            tick(len(rows))
    return found


def _batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield the sequences by number, longest first: little padding, and memory runs out at once."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]


@contextmanager
def _plain_generation(
    model: PreTrainedModel, ends: Sequence[int], max_new_tokens: int
) -> Iterator[None]:
    # ``generate`` fills what its arguments leave open from the model's own config, so a plain
    # one has to take its place.
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else PADDING,
    )
    try:
        yield
    finally:
        model.generation_config = own
