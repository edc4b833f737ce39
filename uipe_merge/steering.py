"""What else than α·v goes into a step: asked for, checked, and written down.

The formulas are in ``resolving``. A further update is a pair of checkpoints, NEW and OLD, whose
difference it is; on the command line ``NEW`` alone (OLD is the original then) or ``NEW@@OLD``.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from uipe_merge.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

Granularity = Literal["tensor", "layer", "model"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
"""Over which tensors inner products are taken."""

Control = Literal["none", "random"]
CONTROLS: tuple[Control, ...] = get_args(Control)

MIN_COS, MAX_ALPHA = 0.05, 5.0
GRANULARITY: Granularity = "layer"
"""What is taken where it is not asked for."""

NUMBER = re.compile(r"[-+]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|inf|nan)")
"""A number as the command line takes it."""

_BETWEEN = "@@"


class Update(NamedTuple):
    """A difference of two checkpoints, each named as the two arguments of a merge are.

    Attributes:
        new: The checkpoint after the change.
        old: The one before it; empty for the original.
    """

    new: str
    old: str = ""

    @property
    def text(self) -> str:
        """The update as the command line takes it."""
        new = f"./{self.new}" if self.new == "original" else self.new
        return f"{new}{_BETWEEN}{self.old}" if self.old else new


ORIGINAL_ITSELF = Update("original")
"""θ₀ as the direction to stay away from; a directory of that name is ``./original``."""


@dataclass(frozen=True, slots=True)
class Steering:
    """How the step s that is added to θᵤ departs from α·v.

    Attributes:
        along: Related updates: α is multiplied by the projection of their sum on v.
        min_cos: Related updates whose cosine with v is smaller count nothing.
        max_alpha: The most that they multiply α by.
        away_from: A protected update that the step must not undo; ``ORIGINAL_ITSELF`` for θ₀.
        always: Remove what the step has along it even where it does not undo it.
        rank: Only so many singular directions of every matrix's update are amplified.
        energy: As many as hold this share of ‖v‖²_F.
        rank_all: Matrices outside the layers too: embeddings and head.
        control: ``random`` replaces the step by a random one of the same norm.
        granularity: One of ``GRANULARITIES``.
        add: Further updates with their coefficients β.

    Raises:
        RecipeError: A number is out of its range.
        UsageError: Options that exclude one another, or one that another has no use for.
    """

    along: tuple[Update, ...] = ()
    min_cos: float = MIN_COS
    max_alpha: float = MAX_ALPHA
    away_from: Update | None = None
    always: bool = False
    rank: int | None = None
    energy: float | None = None
    rank_all: bool = False
    control: Control = "none"
    granularity: Granularity = GRANULARITY
    add: tuple[tuple[Update, float], ...] = ()

    def __post_init__(self) -> None:
        """Check every field."""
        if not -1 <= self.min_cos <= 1:  # NaN is in no range
            raise RecipeError(f"min-cos is {self.min_cos}", remedy="give a cosine, -1 to 1")
        if not 0 <= self.max_alpha < math.inf:
            raise RecipeError(f"max-alpha is {self.max_alpha}", remedy="give one from 0 up")
        if self.rank is not None and self.rank < 1:
            raise RecipeError(f"rank is {self.rank}", remedy="give a whole number from 1 up")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise RecipeError(f"energy is {self.energy}", remedy="give a share above 0, up to 1")
        if self.control not in CONTROLS:
            raise UsageError(
                f"unknown control '{self.control}'", remedy=f"choose one of {', '.join(CONTROLS)}"
            )
        if self.granularity not in GRANULARITIES:
            raise UsageError(
                f"unknown granularity '{self.granularity}'",
                remedy=f"choose one of {', '.join(GRANULARITIES)}",
            )
        self._check_updates()
        self._check_together()

    def _check_updates(self) -> None:
        for update in self.updates:
            if not update.new or "\0" in update.text:
                raise RecipeError(f"'{update.text}' is no update", remedy="name a checkpoint")
        for update, beta in self.add:
            if not math.isfinite(beta):
                raise RecipeError(f"the coefficient of '{update.text}' is {beta}")

    def _check_together(self) -> None:
        if self.rank is not None and self.energy is not None:
            raise UsageError("has both a rank and an energy", remedy="give one of them")
        projects = "--along, --away-from or --control"
        useless = [
            (self.always and self.away_from is None, "--always", "--away-from"),
            (self.rank_all and not self.low_rank, "--rank-all", "--rank or --energy"),
            (self.min_cos != MIN_COS and not self.along, "--min-cos", "--along"),
            (self.max_alpha != MAX_ALPHA and not self.along, "--max-alpha", "--along"),
            (self.granularity != GRANULARITY and not self.measured, "--granularity", projects),
        ]
        for found, option, needed in useless:
            if found:
                raise UsageError(
                    f"{option} changes nothing without {needed}", remedy="leave it out"
                )

    @property
    def active(self) -> bool:
        """Whether a step is anything else than α·v."""
        return self.measured or self.low_rank or bool(self.add)

    @property
    def measured(self) -> bool:
        """Whether inner products decide about the coefficients."""
        return bool(self.along) or self.away_from is not None or self.control != "none"

    @property
    def low_rank(self) -> bool:
        """Whether matrices' updates are cut to a part of their rank."""
        return self.rank is not None or self.energy is not None

    @property
    def updates(self) -> list[Update]:
        """Every update that is named, θ₀ itself not among them."""
        found = [*self.along, *(update for update, _ in self.add)]
        if self.away_from is not None and self.away_from != ORIGINAL_ITSELF:
            found.append(self.away_from)
        return found

    @property
    def checkpoints(self) -> list[str]:
        """The checkpoints of all updates, each once."""
        return list(dict.fromkeys(name for update in self.updates for name in update if name))

    @property
    def held(self) -> list[Update]:
        """The updates that inner products are taken with, as ``resolving`` orders them."""
        return [*self.along, *([] if self.away_from is None else [self.away_from])]

    def words(self, name: Callable[[str], str] = str) -> list[str]:
        """Return the options of the command line that say the same.

        Args:
            name: Gives the name to write for a checkpoint.
        """

        def text(update: Update) -> str:
            return Update(name(update.new), update.old and name(update.old)).text

        words = [word for update in self.along for word in ("--along", text(update))]
        if self.min_cos != MIN_COS:
            words += ["--min-cos", repr(float(self.min_cos))]
        if self.max_alpha != MAX_ALPHA:
            words += ["--max-alpha", repr(float(self.max_alpha))]
        if self.away_from is not None:
            itself = self.away_from == ORIGINAL_ITSELF
            words += ["--away-from", self.away_from.new if itself else text(self.away_from)]
        words += ["--always"] if self.always else []
        words += [] if self.rank is None else ["--rank", str(self.rank)]
        words += [] if self.energy is None else ["--energy", repr(float(self.energy))]
        words += ["--rank-all"] if self.rank_all else []
        words += ["--control", self.control] if self.control != "none" else []
        words += ["--granularity", self.granularity] if self.granularity != GRANULARITY else []
        for update, beta in self.add:
            words += ["--add", f"{text(update)}={float(beta)!r}"]
        return words

    def canonical(self) -> dict[str, object]:
        """Return it as plain values, numbers as exact hexadecimal floats."""
        return {
            "along": [list(update) for update in self.along],
            "min_cos": float(self.min_cos).hex(),
            "max_alpha": float(self.max_alpha).hex(),
            "away_from": self.away_from and list(self.away_from),
            "always": self.always,
            "rank": self.rank,
            "energy": None if self.energy is None else float(self.energy).hex(),
            "rank_all": self.rank_all,
            "control": self.control,
            "granularity": self.granularity,
            "add": [[*update, float(beta).hex()] for update, beta in self.add],
        }

    def document(self) -> dict[str, object]:
        """Return what a recipe file says of it: only what is not the default."""
        said: dict[str, object] = {}
        if self.along:
            said["along"] = [_pair(update) for update in self.along]
        if self.away_from is not None:
            itself = self.away_from == ORIGINAL_ITSELF
            said["away_from"] = "original" if itself else _pair(self.away_from)
        for field, default in _DEFAULTS.items():
            if (value := getattr(self, field)) != default:
                said[field] = float(value) if isinstance(default, float) else value
        if self.add:
            said["add"] = [{**_pair(update), "beta": float(beta)} for update, beta in self.add]
        return said


PLAIN = Steering()
"""s = α·v."""

_DEFAULTS: dict[str, object] = {
    "min_cos": MIN_COS,
    "max_alpha": MAX_ALPHA,
    "always": False,
    "rank": None,
    "energy": None,
    "rank_all": False,
    "control": "none",
    "granularity": GRANULARITY,
}


def _pair(update: Update) -> dict[str, object]:
    return {"new": update.new, **({"old": update.old} if update.old else {})}


def parse_update(text: str) -> Update:
    """Return the update of ``NEW`` or ``NEW@@OLD``; a directory may have ``@@`` in its name.

    Raises:
        RecipeError: One of the two is missing.
    """
    if text == ORIGINAL_ITSELF.new:
        raise RecipeError(
            "'original' is no update; --away-from alone takes it",
            remedy="write ./original for a directory of that name",
        )
    parts = [text]
    if _BETWEEN in text and not Path(text).is_dir():
        cuts = [match.start() for match in re.finditer(_BETWEEN, text)]
        pairs = [[text[:cut], text[cut + len(_BETWEEN) :]] for cut in cuts]
        there = (pair for pair in pairs if all(map(os.path.isdir, pair)))
        parts = next(there, pairs[-1])
    if not all(parts):
        raise RecipeError(
            f"the update '{text}' is not NEW or NEW{_BETWEEN}OLD",
            remedy="name the checkpoint after the change, and the one before it",
        )
    return Update(*parts)


def parse_protected(text: str) -> Update:
    """Return what ``--away-from`` names: an update, or ``original``."""
    return ORIGINAL_ITSELF if text == ORIGINAL_ITSELF.new else parse_update(text)


def parse_added(text: str) -> tuple[Update, float]:
    """Return update and β of ``UPDATE=BETA``.

    Raises:
        RecipeError: It has not that form.
    """
    named, _, beta = text.rpartition("=")
    if named and NUMBER.fullmatch(beta):
        return parse_update(named), float(beta)
    raise RecipeError(
        f"'{text}' is not UPDATE=BETA", remedy=f"write it like repaired{_BETWEEN}unlearned=0.5"
    )
