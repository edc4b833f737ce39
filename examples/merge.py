"""Merge from Python: look at the update, choose the dtype by it, merge, read the report.

python examples/merge.py ORIGINAL UNLEARNED OUT
"""

import sys

import uipe_merge

ALPHA = 1.0
TOLERANCE = 0.05


def main(original: str, unlearned: str, output: str) -> None:
    """Write OUT in float32 only where the original dtype would round the step away."""
    found = uipe_merge.inspect(original, unlearned, alphas=(ALPHA,), progress=False)
    print(f"‖v‖/‖θᵤ‖ = {found.total.ratio:.2e}, {len(found.zero)} tensors unchanged")
    (effective,) = found.total.effective_alphas
    dtype = "auto" if effective is not None and abs(effective - ALPHA) < TOLERANCE else "float32"
    report = uipe_merge.merge(original, unlearned, output, alpha=ALPHA, dtype=dtype)
    for name, value in report.summary.rows():
        print(f"{name}: {value}")
    for warning in report.warnings:
        print("warning:", warning)


if __name__ == "__main__":
    main(*sys.argv[1:])
