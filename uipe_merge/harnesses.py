"""Scripts that evaluate every variant of a grid: the same for a machine and for a job array.

Each is a POSIX shell script that takes variant names, by default all, and writes what the harness
says under ``scores/NAME``. What only the user knows is read from the environment, and asked for.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from uipe_merge.errors import UsageError

_HEAD = """\
#!/bin/sh
# Evaluates the variants of this grid, or those that are named: sh evaluate.sh [VARIANT ...]
set -eu
cd "$(dirname "$0")"
grid=$PWD
[ $# -gt 0 ] || for manifest in */uipe_merge.json; do set -- "$@" "${{manifest%/*}}"; done
for name in "$@"; do
  model=$grid/$name
  out=$grid/scores/$name
  [ -f "$model/uipe_merge.json" ] || {{ echo "$name: not made yet" >&2; continue; }}
  mkdir -p "$out"
  echo "== $name" >&2
"""
_OPEN_UNLEARNING = """\
  # Run from a clone of OpenUnlearning: its place, and its name of the model's configuration.
  (cd "${{OPEN_UNLEARNING:?the directory of OpenUnlearning}}" && \\
    python src/eval.py experiment=eval/{suite}/default.yaml \\
      model="${{OU_MODEL:?its model configuration, such as Llama-3.2-1B-Instruct}}" \\
      task_name="$name" overwrite=true {options}\\
      "model.model_args.pretrained_model_name_or_path='$model'" \\
      "paths.output_dir='$out'")
"""
_LM_EVAL = """\
  lm_eval --model hf --model_args "pretrained=$model,dtype=auto" --tasks "${{LM_TASKS:-{tasks}}}" \\
    --batch_size "${{LM_BATCH:-8}}" --output_path "$out"
"""
_SLURM = """\
#!/bin/sh
#SBATCH --job-name=uipe-grid
#SBATCH --array=0-{last}
#SBATCH --output=slurm-%A_%a.log
# Add what your cluster wants (--partition, --gres=gpu:1, --time), then: sbatch evaluate.slurm
set -eu
cd "${{SLURM_SUBMIT_DIR:-$(dirname "$0")}}"
set --
for manifest in */uipe_merge.json; do set -- "$@" "${{manifest%/*}}"; done
shift "$SLURM_ARRAY_TASK_ID"
exec sh evaluate.sh "$1"
"""
HARNESSES = ("open-unlearning", "muse", "wmdp", "lm-eval")


def evaluate_script(harness: str, retain_logs: str | None = None) -> str:
    """Return ``evaluate.sh``.

    Args:
        harness: One of ``HARNESSES``, or a command with ``{model}`` in it, and ``{out}``.
        retain_logs: Evaluation logs of a retain-only model, for OpenUnlearning.

    Raises:
        UsageError: It is neither, or the logs are of no use to it.
    """
    suites = {"open-unlearning": "tofu", "muse": "muse"}
    if retain_logs is not None and harness not in suites:
        raise UsageError(
            f"--retain-logs says nothing to {harness}", remedy="it is for OpenUnlearning"
        )
    if harness in suites:
        logs = (
            ""
            if retain_logs is None
            else f"{shlex.quote(_hydra('retain_logs_path', os.fspath(Path(retain_logs).absolute())))} "
        )
        body = _OPEN_UNLEARNING.format(suite=suites[harness], options=logs)
    elif harness in HARNESSES:
        tasks = "wmdp_bio,wmdp_cyber,mmlu" if harness == "wmdp" else "mmlu"
        body = _LM_EVAL.format(tasks=tasks)
    elif "{model}" in harness:
        body = f"  {_command(harness)}\n"
    else:
        raise UsageError(
            f"'{harness}' is no harness and no command with {{model}} in it",
            remedy=f"choose one of {', '.join(HARNESSES)}",
        )
    return _HEAD.format() + body + "done\n"


def slurm_script(variants: int) -> str:
    """Return ``evaluate.slurm``, which evaluates one variant in each job of an array."""
    return _SLURM.format(last=variants - 1)


def _command(template: str) -> str:
    """Return a command with the shell's own variables in the places of ours."""
    return template.replace("{model}", '"$model"').replace("{out}", '"$out"')


def _hydra(key: str, value: str) -> str:
    """Return an override whose value may hold what Hydra's grammar would read."""
    quoted = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{quoted}'"
