"""α as a recipe of mergekit gives it: settings by piece of name, spread over stretches of layers.

Of a tensor in layer l of a stretch of n layers, t is l/(n − 1), or 1 where n is 1; of one outside of
the layers t is 0, and the first stretch decides about embeddings, the last about final norm and head.
A list of values is linear in t from the first to the last. The first setting whose piece of text is
in the tensor's name decides, of the innermost scope that has one. Source: mergekit 0.1.5, whose
floating-point operations are kept, so that the values have its bits.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Literal, NamedTuple

from uipe_merge.errors import RecipeError, listed
from uipe_merge.naming import place, stack

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from uipe_merge.arithmetic.terms import Arithmetic

Method = Literal["task_arithmetic", "uipe"]
PARAMETERS: dict[Method, str] = {"task_arithmetic": "weight", "uipe": "alpha"}
"""The parameter of a method that is given for each model."""

_FIRST = re.compile(
    r"(^|\.)(embed_tokens|tok_embeddings|word_embeddings|embed_in|wte|wpe)\.weight$"
)
_LAST = re.compile(
    r"(^|\.)(norm|norm_f|ln_f|final_layer_?norm|lm_head|embed_out|output|output_layer|score)"
    r"\.(weight|bias)$"
)


class Setting(NamedTuple):
    """Values for the tensors that have a piece of text in their names.

    Attributes:
        text: The piece; the empty one is in all names.
        values: One value, or several spread evenly from t = 0 to t = 1.
    """

    text: str
    values: tuple[float, ...]

    def at(self, t: float) -> float:
        """Return the value at ``t``."""
        if len(self.values) == 1:
            return self.values[0]
        position = t * (len(self.values) - 1)
        before = int(position)
        share = position - before
        after = min(before + 1, len(self.values) - 1)
        return (1 - share) * self.values[before] + share * self.values[after]


Scope = tuple[Setting, ...]
"""Settings of one place in the file, in their order."""


class Stretch(NamedTuple):
    """Consecutive layers with settings of their own.

    Attributes:
        layers: The first layer, and the one after the last; ``None`` for all there are.
        scopes: What decides about them, the innermost first.
    """

    layers: tuple[int, int] | None
    scopes: tuple[Scope, ...]

    def at(self, name: str, t: float) -> float | None:
        """Return the value for a tensor; ``None`` where nothing decides about it."""
        for scope in self.scopes:
            for setting in scope:
                if setting.text in name:
                    return setting.at(t)
        return None


@dataclass(frozen=True, slots=True)
class MergekitRecipe:
    """What a recipe of mergekit says of α, and of how the sum is formed.

    Attributes:
        method: Its merge method.
        stretches: The layers in their order.
        arithmetic: What gives the bits of that method in the type that the recipe names.
        config: The file, as it was named.
        text: Its content.
        remarks: What in it means something else here, or nothing.
    """

    method: Method
    stretches: tuple[Stretch, ...]
    arithmetic: Arithmetic
    config: str
    text: str
    remarks: tuple[str, ...] = ()

    def alphas(self, names: Sequence[str]) -> dict[str, float]:
        """Return α of every tensor; for task arithmetic, its weight minus 1.

        Raises:
            RecipeError: As for ``values``.
        """
        values = self.values(names)
        if self.method == "uipe":
            return values
        found = {weight: alpha_of(weight) for weight in set(values.values())}
        return {name: found[weight] for name, weight in values.items()}

    def values(self, names: Sequence[str]) -> dict[str, float]:
        """Return the weight or the α of every tensor, as the recipe has it.

        Raises:
            RecipeError: Nothing decides about a tensor, the layers are others than the model's, or
                it cannot be told which stretch a tensor belongs to.
        """
        try:
            return self._values(names)
        except RecipeError as error:
            raise RecipeError(error.message, file=self.config, remedy=error.remedy) from None

    @property
    def named(self) -> list[float]:
        """Every weight or α that is in the recipe; where one is too large for α, so is the other."""
        settings = (each for one in self.stretches for scope in one.scopes for each in scope)
        return [value for each in settings for value in each.values]

    def unmatched(self, names: Sequence[str]) -> list[str]:
        """Return the pieces of text that no tensor has in its name."""
        settings = (each for one in self.stretches for scope in one.scopes for each in scope)
        texts = dict.fromkeys(each.text for each in settings)
        return [text for text in texts if not any(text in name for name in names)]

    def document(self) -> dict[str, object]:
        """Return it as plain values, for the record."""
        return {
            "merge_method": self.method,
            "arithmetic": self.arithmetic,
            "file": self.config,
            "config": self.text,
        }

    def canonical(self) -> dict[str, object]:
        """Return what decides about the bytes, numbers as exact hexadecimal floats."""
        stretches = [
            [
                one.layers,
                [
                    [[text, [value.hex() for value in values]] for text, values in s]
                    for s in one.scopes
                ],
            ]
            for one in self.stretches
        ]
        return {"method": self.method, "arithmetic": self.arithmetic, "stretches": stretches}

    def _values(self, names: Sequence[str]) -> dict[str, float]:
        layers = {name: place(name).layer for name in names}
        count = self._require_layers(names, layers.values())
        found: dict[str, float | None] = {}
        unplaced: list[str] = []
        for name, layer in layers.items():
            if layer is not None:
                stretch, first, last = self._around(layer, count)
                t = (layer - first) / (last - first - 1) if last - first > 1 else 1.0
                found[name] = stretch.at(name, t)
                continue
            ends = [self.stretches[0].at(name, 0.0), self.stretches[-1].at(name, 0.0)]
            if ends[0] != ends[1] and not (_FIRST.search(name) or _LAST.search(name)):
                unplaced.append(name)
            found[name] = ends[1 if _LAST.search(name) else 0]
        if unplaced:
            raise RecipeError(
                "has slices that differ, and whether the first or the last decides cannot be told "
                f"of {listed(unplaced)}",
                remedy="give these tensors a filter in both",
            )
        if missing := [name for name, value in found.items() if value is None]:
            raise RecipeError(
                f"has no {PARAMETERS[self.method]} for {listed(missing)}",
                remedy="end a list of filters with one entry that has a value alone",
            )
        return {name: value for name, value in found.items() if value is not None}

    def _require_layers(self, names: Iterable[str], layers: Iterable[int | None]) -> int:
        """Return how many layers there are."""
        count = max((layer for layer in layers if layer is not None), default=-1) + 1
        stacks = {stack(name) for name in names} - {""}
        if len(stacks) > 1 and not self._constant:
            raise RecipeError(
                f"gives values by layer, and the model has several stacks: {listed(sorted(stacks))}",
                remedy="use filters with one value each",
            )
        last = self.stretches[-1].layers
        if last is not None and last[1] != count:
            raise RecipeError(
                f"has slices of {last[1]} layers, and the model has {count}",
                remedy="a model of other layers than its inputs' is mergekit's own work",
            )
        return count

    @property
    def _constant(self) -> bool:
        settings = (each for scope in self.stretches[0].scopes for each in scope)
        return len(self.stretches) == 1 and all(len(each.values) == 1 for each in settings)

    def _around(self, layer: int, count: int) -> tuple[Stretch, int, int]:
        """Return the stretch of a layer, and where it begins and ends."""
        for stretch in self.stretches:
            first, last = stretch.layers or (0, count)
            if first <= layer < last:
                return stretch, first, last
        raise AssertionError(layer)  # the stretches cover all layers


def single(value: float) -> float:
    """Round to float32."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def alpha_of(weight: float) -> float:
    """Return α of a weight, with no more digits than the weight has."""
    return float(Decimal(repr(weight)) - 1)


def weight_of(alpha: float) -> float:
    """Return the shortest weight that is 1 + α, as float32 has it."""
    weight = float(Decimal(repr(alpha)) + 1)
    return weight if single(weight) == single(1 + alpha) else 1 + alpha
