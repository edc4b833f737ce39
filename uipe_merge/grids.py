"""Grids: one directory with a model for every α, the checkpoints read once for all of them."""

from __future__ import annotations

import math
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from uipe_merge.checkpoint.urls import is_url
from uipe_merge.errors import UsageError
from uipe_merge.job import plan_job
from uipe_merge.steering import GRANULARITY, PLAIN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from uipe_merge.inputs import Inputs
    from uipe_merge.job import Job
    from uipe_merge.recipe import Recipe

Family = Literal["uipe", "control", "reference"]

_MOST = 1000
_RANGE = re.compile(r"([^:]+):([^:]+):([^:]+)")
_DECIMALS = 12  # of a step added up: 0.1 three times is 0.3


class Variant(NamedTuple):
    """One model of a grid.

    Attributes:
        name: Of its directory: letters, digits, points and hyphens, which no shell and no
            override of Hydra reads as anything else.
        family: ``uipe``, ``control`` for a random step, ``reference`` for α = 0 and −1.
        job: What makes it.
    """

    name: str
    family: Family
    job: Job

    @property
    def alpha(self) -> float:
        """α where no rule and no layer decides."""
        return self.job.plan.recipe.alpha


class Grid(NamedTuple):
    """A grid that was planned.

    Attributes:
        directory: Where it is, a real path.
        named: The same as the user named it.
        variants: Its models.
        inputs: What they are made of.
        command: The command line that makes it.
    """

    directory: Path
    named: str
    variants: list[Variant]
    inputs: Inputs
    command: str


def parse_alphas(text: str) -> list[float]:
    """Return the α of ``0,0.25,0.5`` or of ``0:4:0.5``, whose end is among them.

    Raises:
        UsageError: It is neither, or too many.
    """
    wrong = UsageError(
        f"'{text}' is no list of alphas", remedy="write it like 0,0.25,0.5,1,2 or 0:4:0.5"
    )
    match = _RANGE.fullmatch(text)
    try:
        if match is None:
            return [float(part) for part in text.split(",")]
        first, last, step = map(float, match.groups())
        count = math.floor((last - first) / step + 1e-9) + 1
    except (ValueError, ZeroDivisionError, OverflowError):
        raise wrong from None
    if not 0 < count <= _MOST:
        raise wrong
    return [round(first + step * number, _DECIMALS) for number in range(count)]


def plan_grid(
    inputs: Inputs,
    output: str | os.PathLike[str],
    alphas: Sequence[float],
    recipe: Recipe,
    *,
    references: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
) -> Grid:
    """Decide everything about every variant; write nothing.

    Args:
        inputs: The checkpoints that the recipe names, opened.
        output: The directory of the grid, made if it is not there.
        alphas: α of each variant, in place of the recipe's own; each counts once.
        recipe: All else. With a random control every α that is not 0 gives two variants.
        references: Add the unlearned model and the original as this tool writes them, and a
            random control at the largest |α|.
        overwrite: Replace variants of another recipe.
        device: As for ``merge``.

    Raises:
        UipeMergeError: Whatever would keep it from beginning, with its exit code.
    """
    named = os.fspath(output)
    if is_url(named):
        raise UsageError(
            "a grid is made in a directory of this machine", file=named, remedy="copy it then"
        )
    if not alphas:
        raise UsageError("no alphas", remedy="give them like --alphas 0,0.25,0.5,1,2")
    asked = sorted({float(alpha) + 0.0 for alpha in alphas})  # −0 is 0
    variants = [
        Variant(
            name,
            family,
            plan_job(
                inputs,
                Path(named) / name,
                chosen,
                overwrite=overwrite,
                device=device,
                parent_made=True,
            ),
        )
        for name, family, chosen in _recipes(asked, recipe, references=references)
    ]
    words = ["uipe-merge", "grid", *inputs.arguments, f"--alphas={','.join(map(repr, asked))}"]
    words += recipe.words(lambda name: inputs.names.get(name, name))[2:]  # all but its own α
    words += [*(["--with-references"] if references else []), "-o", named]
    return Grid(Path(os.path.realpath(named)), named, variants, inputs, shlex.join(words))


def _recipes(
    alphas: list[float], recipe: Recipe, *, references: bool
) -> list[tuple[str, Family, Recipe]]:
    """Name the variants and give each its recipe."""
    control = recipe.steering.control
    uncontrolled = replace(recipe.steering, control="none", granularity=GRANULARITY)
    if uncontrolled.measured:  # else there is nothing to take over groups
        uncontrolled = replace(recipe.steering, control="none")
    plain = replace(recipe, steering=uncontrolled)
    found: list[tuple[str, Family, Recipe]] = []
    if references:
        bare = replace(plain, rules=(), layers=(), gradient=(), steering=PLAIN)
        found.append(("reference-unlearned", "reference", replace(bare, alpha=0.0)))
        if recipe.form == "model":
            found.append(("reference-original", "reference", replace(bare, alpha=-1.0)))
    there = [chosen for _, _, chosen in found]
    for alpha in alphas:
        if replace(plain, alpha=alpha) in there:
            continue  # it would be the reference over again
        found.append((f"uipe-{_written(alpha)}", "uipe", replace(plain, alpha=alpha)))
    moving = [alpha for alpha in alphas if alpha]
    if control == "none":
        moving = [max(moving, key=abs)] if references and moving and recipe.form == "model" else []
    if moving:
        drawn = replace(recipe, steering=replace(recipe.steering, control="random"))
        found += [
            (f"control-{_written(alpha)}", "control", replace(drawn, alpha=alpha))
            for alpha in moving
        ]
    return found


def _written(alpha: float) -> str:
    return repr(alpha).removesuffix(".0").replace("-", "minus", 1 if alpha < 0 else 0)
