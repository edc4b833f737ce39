"""The recipe: what is accepted, what is refused, and how it is written down."""

import dataclasses
import json
import math

import pytest

from uipe_merge.errors import NumericError, RecipeError, UsageError
from uipe_merge.recipe import ALPHA_LIMIT, Recipe, parse_size
from uipe_merge.steering import ORIGINAL_ITSELF, Steering, Update


@pytest.mark.parametrize("alpha", [0.0, -0.0, 1.0, -1.0, 0.1, 5e-324, 16777215.0, -16777215.0])
def test_finite_alpha_is_accepted(alpha: float) -> None:
    assert Recipe(alpha).alpha == alpha


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf])
def test_alpha_that_is_not_finite(alpha: float) -> None:
    with pytest.raises(RecipeError, match="finite") as caught:
        Recipe(alpha)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("alpha", [ALPHA_LIMIT, -ALPHA_LIMIT, 1e30, 1.7e308])
def test_alpha_so_large_that_the_model_would_be_lost(alpha: float) -> None:
    with pytest.raises(NumericError, match="nothing of the model would be left") as caught:
        Recipe(alpha)
    assert caught.value.exit_code == 7


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_known_dtype(dtype: str) -> None:
    assert Recipe(1, dtype).dtype == dtype


@pytest.mark.parametrize("dtype", ["", "int8", "Float32", "torch.float32", "float64"])
def test_unknown_dtype_is_refused_and_the_known_ones_are_named(dtype: str) -> None:
    with pytest.raises(UsageError, match="auto or one of float32, bfloat16, float16"):
        Recipe(1, dtype)


@pytest.mark.parametrize("limit", [0, -1])
def test_shard_that_holds_nothing(limit: int) -> None:
    with pytest.raises(UsageError, match="holds nothing"):
        Recipe(1, "auto", limit)


def test_recipe_cannot_change() -> None:
    recipe = Recipe(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.alpha = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("alpha", "text"),
    [(1, "0x1.0000000000000p+0"), (0.1, "0x1.999999999999ap-4"), (-0.0, "-0x0.0p+0")],
)
def test_canonical_alpha_is_exact(alpha: float, text: str) -> None:
    canonical = Recipe(alpha, "float16", 7).canonical()
    assert canonical == {
        "alpha": text,
        "dtype": "float16",
        "max_shard_bytes": 7,
        "on_mismatch": "error",
        "rules": [],
        "layers": [],
        "gradient": [],
        "as": "model",
        "rounding": "nearest",
        "seed": 0,
        "along": [],
        "min_cos": (0.05).hex(),
        "max_alpha": (5.0).hex(),
        "away_from": None,
        "always": False,
        "rank": None,
        "energy": None,
        "rank_all": False,
        "control": "none",
        "granularity": "layer",
        "add": [],
    }
    assert float.fromhex(text) == alpha


def test_canonical_steering_is_exact() -> None:
    steering = Steering(
        along=(Update("a"), Update("b", "c")),
        min_cos=-0.1,
        max_alpha=2,
        away_from=ORIGINAL_ITSELF,
        always=True,
        energy=1,
        rank_all=True,
        control="random",
        granularity="tensor",
        add=((Update("d", "e"), 0.1), (Update("f"), -2)),
    )
    canonical = Recipe(1, steering=steering).canonical()
    assert {name: canonical[name] for name in steering.canonical()} == {
        "along": [["a", ""], ["b", "c"]],
        "min_cos": (-0.1).hex(),
        "max_alpha": (2.0).hex(),
        "away_from": ["original", ""],
        "always": True,
        "rank": None,
        "energy": (1.0).hex(),
        "rank_all": True,
        "control": "random",
        "granularity": "tensor",
        "add": [["d", "e", (0.1).hex()], ["f", "", (-2.0).hex()]],
    }
    assert json.loads(json.dumps(canonical, allow_nan=False)) == canonical


STEERINGS = [
    Steering(along=(Update("a"),)),
    Steering(along=(Update("a", "b"),)),
    Steering(along=(Update("a"),), min_cos=math.nextafter(0.05, 1)),
    Steering(along=(Update("a"),), max_alpha=math.nextafter(5, 6)),
    Steering(away_from=Update("a")),
    Steering(away_from=ORIGINAL_ITSELF),
    Steering(away_from=Update("a"), always=True),
    Steering(rank=1),
    Steering(rank=2),
    Steering(rank=1, rank_all=True),
    Steering(energy=1.0),
    Steering(control="random"),
    Steering(control="random", granularity="model"),
    Steering(add=((Update("a"), 0.0),)),
    Steering(add=((Update("a"), -0.0),)),
    Steering(add=((Update("a"), 1.0),)),
    Steering(add=((Update("b"), 1.0),)),
]


@pytest.mark.parametrize("other", STEERINGS, ids=lambda steering: " ".join(steering.words()))
def test_no_two_steerings_are_written_down_alike(other: Steering) -> None:
    """What is written down decides whether a run goes on with another's work."""
    assert [each.canonical() for each in STEERINGS].count(other.canonical()) == 1
    assert other.active
    assert not Steering().active
    assert Recipe(1, steering=other).rest() != Recipe(1).rest()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("17B", 17),
        ("5GB", 5 * 10**9),
        ("5gb", 5 * 10**9),
        ("5G", 5 * 10**9),
        ("2GiB", 2 * 2**30),
        ("2gib", 2 * 2**30),
        ("500 MB", 500 * 10**6),
        (" 10KB ", 10**4),
        ("1.5kB", 1500),
        ("0.5KiB", 512),
        ("1TB", 10**12),
        ("1TiB", 2**40),
    ],
)
def test_sizes_are_decimal_unless_there_is_an_i(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "0",
        "0GB",
        "0.0",
        "0.4B",
        "-1",
        "-5GB",
        "5XB",
        "GB",
        "five",
        "1e9",
        "1,5GB",
        "5 G B",
        "nan",
        "inf",
        "0x10",
        "5GBB",
        "5iB2",
        "1" * 16 + "B",
    ],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a shard size; give one such as 5GB"):
        parse_size(text)


def test_endless_digits_are_refused_like_any_other_nonsense() -> None:
    for text in ("9" * 5000, "1." + "1" * 400 + "GB", "9" * 400 + "TB"):
        with pytest.raises(UsageError, match="is not a shard size"):
            parse_size(text)
