"""A merge in the words of mergekit: a recipe of its, in YAML, that gives every tensor the same α.

Where α differs between tensors it is written as filters, or as a list that mergekit spreads over the
layers, and held against the α of every tensor before it is printed.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from uipe_merge.coefficients import resolve
from uipe_merge.errors import RecipeError, UsageError, listed
from uipe_merge.inputs import Inputs, open_inputs
from uipe_merge.mergekit_recipe import (
    PARAMETERS,
    MergekitRecipe,
    Method,
    Setting,
    Stretch,
    single,
    weight_of,
)
from uipe_merge.naming import place, stack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from uipe_merge.recipe import Recipe

_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_NOTES = {
    "task_arithmetic": "the same update and α; mergekit adds it to the original, in float32",
    "uipe": "for uipe-merge mergekit CONFIG OUT, or uipe-merge CONFIG -o OUT: the same bits",
}
_ROUNDED = "mergekit rounds model+adapter to the model's type first; give it --lora-merge-cache"


def write(
    original: str,
    unlearned: str,
    recipe: Recipe,
    method: Method,
    *,
    allow_pickle: bool = False,
    dequantize: bool = False,
) -> str:
    """Return the recipe of mergekit's for a merge; reads headers only.

    Raises:
        RecipeError: It asks for what mergekit has no word for: all of it, in one line.
        UipeMergeError: Whatever is wrong with the inputs, with its exit code.
    """
    import yaml

    _refuse_unsaid(recipe, dequantize=dequantize)
    inputs = open_inputs(original, unlearned, recipe, allow_pickle=allow_pickle)
    base, model = _references(inputs)
    output = _output_dtype(inputs, recipe)
    # uipe is one size wider than the output, as this program is; task arithmetic has one order.
    computed = "float64" if method == "uipe" and output == "float32" else "float32"
    alphas = resolve(recipe, list(inputs.pairing.pairs))
    values = {
        name: weight_of(alpha) if method == "task_arithmetic" else alpha
        for name, alpha in alphas.items()
    }
    document: dict[str, object] = {
        "merge_method": method,
        "base_model": base,
        "models": [
            {"model": model, "parameters": {PARAMETERS[method]: _said(values, recipe, method)}}
        ],
        "dtype": computed,
        "out_dtype": output,
    }
    notes = [_NOTES[method], *([_ROUNDED] if "+" in base + model else [])]
    return "".join(f"# {note}\n" for note in notes) + yaml.safe_dump(
        document, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    )


def _refuse_unsaid(recipe: Recipe, *, dequantize: bool) -> None:
    asked = {
        **{word: True for word in recipe.steering.words() if word.startswith("--")},
        "--rounding": recipe.rounding != "nearest",
        "--as adapter": recipe.form != "model",
        "--on-mismatch": recipe.on_mismatch != "error",
        "--max-shard-size (give mergekit --out-shard-size)": recipe.max_shard_bytes is not None,
        "--dequantize": dequantize,
    }
    if unsaid := [name for name, there in asked.items() if there]:
        raise RecipeError(
            f"mergekit has no word for {listed(unsaid)}", remedy="leave it out, or merge here"
        )


def _references(inputs: Inputs) -> tuple[str, str]:
    """Return the two models as mergekit names them: MODEL, MODEL@REVISION or MODEL+ADAPTER."""
    original, unlearned = inputs.arguments
    if inputs.pair.unlearned.adapter is not None and "+" not in unlearned:
        unlearned = f"{original}+{unlearned}"
    for named in (original, unlearned):
        local = [folder.location for folder in inputs.folders if folder.location in named]
        odd = [location for location in local if location.startswith("/") and "@" in location]
        if named.count("+") > 1 or "://" in named or odd:
            raise UsageError(
                "is no name of a model that mergekit can read", file=named, remedy="merge here"
            )
    return original, unlearned


def _output_dtype(inputs: Inputs, recipe: Recipe) -> str:
    if recipe.dtype != "auto":
        return recipe.dtype
    specs = (unlearned for _, unlearned in inputs.pairing.pairs.values())
    stored = {spec.kept_dtype.name for spec in specs if spec.dtype.computes}
    if len(stored) == 1 and (name := _NAMES.get(next(iter(stored)))):
        return name
    raise RecipeError(
        f"mergekit writes one type, float32, bfloat16 or float16, and here is "
        f"{', '.join(sorted(stored)) or 'none'}",
        remedy="name one with --dtype",
    )


def _said(values: Mapping[str, float], recipe: Recipe, method: Method) -> Any:  # noqa: ANN401 - YAML
    """Return what gives every tensor its value: a number, or filters.

    Raises:
        RecipeError: Too many filters would be needed.
    """
    common, _ = Counter(values.values()).most_common(1)[0]
    if len(set(values.values())) == 1:
        return common
    for settings in _candidates(values, recipe, method, common):
        one = MergekitRecipe("uipe", (Stretch(None, (settings,)),), "wider", "", "")
        found = one.alphas(list(values))
        if all(single(found[name]) == single(value) for name, value in values.items()):
            return [_entry(setting) for setting in settings]
    raise RecipeError("α differs between too many tensors for filters of mergekit's")


def _candidates(
    values: Mapping[str, float], recipe: Recipe, method: Method, common: float
) -> Iterator[tuple[Setting, ...]]:
    """Yield settings that may give every tensor its value, the ones that read best first."""
    stacks = {stack(name) for name in values} - {""}
    outside = [value for name, value in values.items() if place(name).layer is None]
    rest = Setting("", (outside[0] if len(set(outside)) == 1 else common,))
    if recipe.gradient and not recipe.rules and len(stacks) == 1:
        plain = method == "uipe"
        spread = tuple(alpha if plain else weight_of(alpha) for alpha in recipe.gradient)
        yield Setting(stacks.pop(), spread), rest
    kinds = _grouped(values, _kind)
    varying = {name: value for name, value in values.items() if len(kinds[_kind(name)]) > 1}
    layers = _grouped(varying, _layer)
    fixed = {kind: each for kind, each in kinds.items() if len(each) == 1}
    for groups in (_grouped(values, _stack), _grouped(values, _layer), fixed | layers):
        if all(len(each) == 1 for each in groups.values()):
            found = {text: min(each) for text, each in groups.items()}
            yield _exceptions(found, rest)
            yield (*_exceptions(found), rest)
    yield _exceptions(values, rest)
    yield _exceptions(values)


def _stack(name: str) -> str:
    return stack(name) or name


def _layer(name: str) -> str:
    return name if (layer := place(name).layer) is None else f"{stack(name)}{layer}."


def _kind(name: str) -> str:
    """Return what a tensor's name has in common with its likes in other layers."""
    layer, kind = place(name)
    if layer is None:
        return name
    return f".{kind}.weight" if name.endswith(".weight") else f".{kind}"


def _grouped(values: Mapping[str, float], text: Callable[[str], str]) -> dict[str, set[float]]:
    """Return the values of the tensors that share a text."""
    groups: dict[str, set[float]] = {}
    for name, value in values.items():
        groups.setdefault(text(name), set()).add(value)
    return groups


def _exceptions(values: Mapping[str, float], rest: Setting | None = None) -> tuple[Setting, ...]:
    """Return filters for what differs from the rest, which comes last if there is one.

    A text comes before one that is a part of it, and whole layers come after all else.
    """
    settings = [
        Setting(text, (value,))
        for text, value in values.items()
        if rest is None or value != rest.values[0]
    ]
    settings.sort(key=lambda setting: (setting.text.endswith("."), -len(setting.text)))
    return (*settings, *([] if rest is None else [rest]))


def _entry(setting: Setting) -> dict[str, object]:
    value: object = setting.values[0] if len(setting.values) == 1 else list(setting.values)
    return {"filter": setting.text, "value": value} if setting.text else {"value": value}
