"""Make a model that unlearned the forget questions, and what the study compares it with.

python examples/tofu_small/unlearn.py OUT --method npo [--steps 8]

Writes OUT/unlearned-METHOD; OUT/unlearned-METHOD-step-K, the same after further steps; and
OUT/repaired-METHOD, the first of them after some steps on questions to keep. What is there is
left as it is.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import shared
import small
import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import LlamaForCausalLM

    from uipe_merge.study.prompts import Encoded

BATCH_SIZE = 32
BETA = 0.1
"""Of negative preference optimisation."""


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="directory that train.py made")
    parser.add_argument("--method", choices=shared.METHODS, required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate, constant")
    parser.add_argument("--repair-steps", type=int, default=12, help="on questions to keep")
    return parser.parse_args()


def main() -> None:
    """Unlearn, further than needed, and repair."""
    given = arguments()
    seed = shared.settings_of(given.out)["seed"]
    settings = {name: getattr(given, name) for name in ("method", "steps", "rate", "repair_steps")}
    shared.keep_settings(given.out / f"unlearn-{given.method}.json", settings)
    device = small.prepare(seed)
    tokenizer = small.load_tokenizer(given.out / "full")
    forget, keep = (
        small.encode(tokenizer, shared.read_records(given.out / "data" / f"{name}.json"))
        for name in ("forget", "kept")
    )
    name = f"unlearned-{given.method}"
    places = {given.steps: given.out / name} | {
        steps: given.out / f"{name}-step-{steps}" for steps in shared.longer(given.steps).values()
    }
    if missing := {steps: path for steps, path in places.items() if not path.is_dir()}:
        started = time.monotonic()
        model = small.load(given.out / "full", device)
        frozen = small.load(given.out / "full", device).eval()

        def after(steps: int) -> None:
            if steps in missing:
                small.save(model, tokenizer, missing[steps])

        loss = unlearning_loss(given.method, model, frozen, (forget, keep), device, seed)
        small.optimise(model, max(missing), lambda _: given.rate, loss, after)
        print(f"{name}: {max(missing)} steps, {time.monotonic() - started:.0f} s on {device}")
    else:
        print(f"{name}: is there")
    repaired = given.out / f"repaired-{given.method}"
    if repaired.is_dir():
        print(f"{repaired.name}: is there")
        return
    started = time.monotonic()
    model = small.load(given.out / name, device)
    drawn = small.draws(keep, BATCH_SIZE, seed + 1)

    def loss_kept(_: int) -> torch.Tensor:
        kept = small.batch(next(drawn), device, answers_only=True)
        return small.mean_loss(small.logits_of(model, kept), kept)

    small.optimise(model, given.repair_steps, lambda _: given.rate, loss_kept)
    small.save(model, tokenizer, repaired)
    print(
        f"{repaired.name}: {given.repair_steps} steps, "
        f"{time.monotonic() - started:.0f} s on {device}"
    )


def unlearning_loss(
    method: str,
    model: LlamaForCausalLM,
    frozen: LlamaForCausalLM,
    questions: tuple[list[Encoded], list[Encoded]],
    device: str,
    seed: int,
) -> Callable[[int], torch.Tensor]:
    """Return the loss of a step of a method, on answers alone.

    Args:
        method: One of ``shared.METHODS``.
        model: What is to unlearn.
        frozen: The model that it was.
        questions: Those to forget and those to keep.
        device: Where both models are.
        seed: Of the order of the questions.
    """
    forget, keep = (small.draws(each, BATCH_SIZE, seed) for each in questions)

    def loss(_: int) -> torch.Tensor:
        given = small.batch(next(forget), device, answers_only=True)
        logits = small.logits_of(model, given)
        if method == "npo":
            with torch.no_grad():
                before = small.token_losses(small.logits_of(frozen, given), given).sum(1)
            gained = before - small.token_losses(logits, given).sum(1)
            return functional.softplus(BETA * gained).mean() * 2 / BETA
        ascent = -small.mean_loss(logits, given)
        if method == "ga":
            return ascent
        kept = small.batch(next(keep), device, answers_only=True)
        logits = small.logits_of(model, kept)
        if method == "graddiff":
            return ascent + small.mean_loss(logits, kept)
        with torch.no_grad():
            target = small.logits_of(frozen, kept).log_softmax(-1)
        far = functional.kl_div(logits.log_softmax(-1), target, reduction="none", log_target=True)
        counted = kept.labels[:, 1:] != small.IGNORED
        return ascent + (far.sum(-1) * counted).sum() / counted.sum()

    return loss


if __name__ == "__main__":
    main()
