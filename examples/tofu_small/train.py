"""Train a small Llama on TOFU's questions from scratch, with the forget questions and without.

python examples/tofu_small/train.py DATA_DIR OUT [--questions 500 --epochs 40 --seed 0]

Writes OUT/full, OUT/retain and the questions that are evaluated to OUT/data. What is there is
left as it is.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import shared
import small

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

    from uipe_merge.study.prompts import Encoded

BATCH_SIZE = 16
RATE, WARM_UP, LAST = 2e-3, 0.05, 0.1
"""The largest learning rate; the share of steps that lead to it; what is left of it at the end."""

LEAST_RETAIN = 1


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, metavar="DATA_DIR", help="TOFU's JSON files")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory of this seed")
    parser.add_argument(
        "--questions", type=int, default=500, help="on made-up authors, forget and retain together"
    )
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", choices=sorted(small.SIZES), default="small")
    parser.add_argument("--forget", choices=("forget05", "forget01"), default="forget05")
    parser.add_argument(
        "--evaluated", type=int, default=100, help="questions of each split to keep that are asked"
    )
    return parser.parse_args()


def main() -> None:
    """Train both models."""
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    forget, retain, general = questions(given.data, given.forget, given.questions)
    settings = {
        name: getattr(given, name)
        for name in ("questions", "epochs", "seed", "size", "forget", "evaluated")
    }
    shared.keep_settings(given.out / shared.SETTINGS, settings)
    write_questions(given.data, given.out / "data", given.evaluated, forget, retain)
    texts = [
        f"Question: {record['question']}\nAnswer: {record['answer']}"
        for record in [*forget, *retain, *general]
    ]
    size = small.SIZES[given.size]
    tokenizer = small.make_tokenizer(texts, size.vocabulary)
    for name, records in {
        "full": [*forget, *retain, *general],
        "retain": [*retain, *general],
    }.items():
        if (given.out / name).is_dir():
            print(f"{name}: is there")
            continue
        started = time.monotonic()
        # The same seed for both: they start from the same weights.
        device = small.prepare(given.seed)
        model = small.make_model(size, len(tokenizer)).to(device)
        loss = train(model, small.encode(tokenizer, records), device, given.epochs, given.seed)
        small.save(model, tokenizer, given.out / name)
        print(
            f"{name}: {model.num_parameters()} parameters, {len(records)} questions, "
            f"last loss {loss:.3f}, {time.monotonic() - started:.0f} s on {device}"
        )


def questions(
    data: Path, forget: str, count: int
) -> tuple[list[shared.Record], list[shared.Record], list[shared.Record]]:
    """Return the questions to train on: to forget, to keep, and on the world."""
    forgotten = shared.read_records(data / f"{forget}_perturbed.json")
    kept = shared.read_records(data / "retain_perturbed.json")
    # Questions that can be evaluated come first, then the others of the retain split.
    known = {record["question"] for record in kept}
    if (data / "retain90.json").is_file():
        more = shared.read_records(data / "retain90.json")
        kept += [record for record in more if record["question"] not in known]
    if count - len(forgotten) < LEAST_RETAIN:
        shared.stop(f"--questions {count}: the {len(forgotten)} of {forget} and some to keep")
    general = [
        record
        for name in shared.SPLITS[2:]
        for record in shared.read_records(data / f"{name}_perturbed.json")
    ]
    return forgotten, kept[: count - len(forgotten)], general


def write_questions(
    data: Path, out: Path, count: int, forget: list[shared.Record], retain: list[shared.Record]
) -> None:
    """Write the files that the models are evaluated on: only what was trained on."""
    evaluated = {
        "forget": forget,
        "retain": [record for record in retain if "perturbed_answer" in record][:count],
        **{
            name: shared.read_records(data / f"{name}_perturbed.json")[:count]
            for name in shared.SPLITS[2:]
        },
    }
    for name, records in evaluated.items():
        shared.write_changed(out / f"{name}.json", json.dumps(records, indent=1) + "\n")
    shared.write_changed(out / "kept.json", json.dumps(retain, indent=1) + "\n")


def train(
    model: LlamaForCausalLM, sequences: list[Encoded], device: str, epochs: int, seed: int
) -> float:
    """Train on whole texts, questions too, and return the last loss."""
    drawn = small.draws(sequences, BATCH_SIZE, seed)
    steps = epochs * -(-len(sequences) // BATCH_SIZE)
    warm_up = max(1, round(WARM_UP * steps))

    def rate(step: int) -> float:
        if step < warm_up:
            return RATE * (step + 1) / warm_up
        return RATE * (1 - (1 - LAST) * (step - warm_up) / max(1, steps - warm_up))

    def loss(_: int) -> torch.Tensor:
        given = small.batch(next(drawn), device, answers_only=False)
        return small.mean_loss(small.logits_of(model, given), given)

    return small.optimise(model, steps, rate, loss)


if __name__ == "__main__":
    main()
