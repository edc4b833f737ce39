"""The embedded example: a fact learned, partly unlearned, and forgotten further by α.

A two-layer Llama is trained from scratch on a few sentences, a handful of gradient-ascent
steps on one of them make the unlearned model, and a real merge extrapolates it. Runs offline
on a processor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from uipe_merge import job, running
from uipe_merge.executors import make_executor
from uipe_merge.output.filesystem import LocalFileSystem
from uipe_merge.recipe import Recipe

if TYPE_CHECKING:
    from pathlib import Path

    from uipe_merge.progress import Progress

FORGET = "alice lives in paris"
RELATED = "the home of alice is paris"
RETAIN = ("bob lives in rome", "the home of bob is rome", "carol lives in oslo")
OTHERS = (
    "the home of carol is oslo",
    "alice likes tea",
    "bob likes milk",
    "carol likes juice",
)
ALPHAS = (1.0, 2.0)
_EPOCHS = 120
_ASCENT_STEPS = 6


@dataclass(frozen=True, slots=True)
class Row:
    """Probability of the last word of each kind of sentence, under one model."""

    name: str
    forget: float
    related: float
    retain: float


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demonstration made.

    Attributes:
        rows: The original, the unlearned and the merged models.
        output: The last merged model's directory.
        commands: The commands that make the merged models again.
    """

    rows: list[Row]
    output: Path
    commands: list[str]


def run(root: Path, progress: Progress) -> DemoResult:
    """Make ``original`` and ``unlearned`` under ``root``, merge them, and measure all.

    Raises:
        UipeMergeError: The directory cannot be written.
    """
    transformers_logging.disable_progress_bar()
    original, unlearned = root / "original", root / "unlearned"
    tokenizer = make_pair(original, unlearned)
    models = {"original": original, "unlearned": unlearned}
    outputs = [root / f"merged-{alpha:g}" for alpha in ALPHAS]
    commands = []
    for alpha, output in zip(ALPHAS, outputs, strict=True):
        prepared = job.prepare(original, unlearned, output, Recipe(alpha), overwrite=True)
        running.run(prepared, make_executor(None), LocalFileSystem(), progress)
        models[f"merged, α = {alpha:g}"] = output
        commands.append(prepared.command)
    rows = [
        _measure(name, LlamaForCausalLM.from_pretrained(path, dtype=torch.float32), tokenizer)
        for name, path in models.items()
    ]
    return DemoResult(rows, outputs[-1], commands)


def make_pair(original: Path, unlearned: Path) -> PreTrainedTokenizerFast:
    """Train and save the two models in bfloat16, each with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sentences = [FORGET, RELATED, *RETAIN, *OTHERS]
    for _ in range(_EPOCHS):
        _descend(model, optimiser, _loss(model, tokenizer, sentences))
    _save(model, tokenizer, original)
    # Gradient ascent on the one sentence: what GA-type unlearning does.
    ascent = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(_ASCENT_STEPS):
        _descend(model, ascent, -_loss(model, tokenizer, [FORGET]))
    _save(model, tokenizer, unlearned)
    return tokenizer


def _tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({word for text in (FORGET, RELATED, *RETAIN, *OTHERS) for word in text.split()})
    vocabulary = {word: index for index, word in enumerate(["<s>", "</s>", "<unk>", *words])}
    words_to_ids = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106 - a token
    words_to_ids.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words_to_ids,
        bos_token="<s>",  # noqa: S106 - a token of the vocabulary
        eos_token="</s>",  # noqa: S106 - a token of the vocabulary
        unk_token="<unk>",  # noqa: S106 - a token of the vocabulary
        pad_token="</s>",  # noqa: S106 - a token of the vocabulary
    )


def _loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sentences: list[str]
) -> torch.Tensor:
    losses = []
    for sentence in sentences:
        ids = torch.tensor([[0, *tokenizer(sentence)["input_ids"]]])
        loss = model(input_ids=ids, labels=ids).loss
        assert loss is not None  # noqa: S101 - labels were given
        losses.append(loss)
    return torch.stack(losses).mean()


def _descend(model: LlamaForCausalLM, optimiser: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    model.to(torch.float32)


@torch.no_grad()
def _measure(name: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Row:
    """Return the mean probability of the last word of each kind of sentence."""

    def last_word(*sentences: str) -> float:
        total = 0.0
        for sentence in sentences:
            ids = [0, *tokenizer(sentence)["input_ids"]]
            logits = model(input_ids=torch.tensor([ids[:-1]])).logits
            total += float(logits[0, -1].softmax(-1)[ids[-1]])
        return total / len(sentences)

    return Row(name, last_word(FORGET), last_word(RELATED), last_word(*RETAIN))
