"""The engine alone: one merge through the library, timed after every import.

Run as a program of its own: ``engine.py ORIGINAL UNLEARNED OUTPUT ALPHA``. Prints
``{"seconds": …}``: from the headers to the published directory, with fsync, hashes, checks.
"""

from __future__ import annotations

import json
import sys
import time

import yaml
from huggingface_hub import ModelCardData

from uipe_merge import api, engine, executors, job, kernels

IMPORTED = (ModelCardData, engine, executors, job, kernels, yaml)
"""What ``api.merge`` would import when it is called, torch and numpy with it."""


def main() -> None:
    """Merge, and print how long it took."""
    original, unlearned, output, alpha = sys.argv[1:]
    began = time.perf_counter()
    api.merge(original, unlearned, output, alpha=float(alpha), progress=False)
    print(json.dumps({"seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
