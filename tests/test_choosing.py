"""The grammar of constraints, the Pareto front, and every way a choice can come out."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uipe_merge.errors import RecipeError
from uipe_merge.study.choosing import Constraint, Row, choose, pareto_front, parse_constraint

FQ, MU = "forget_quality", "model_utility"
KEEP = parse_constraint("model_utility>=0.95*unlearned")


def row(
    name: str,
    alpha: float | None,
    quality: float | None,
    utility: float | None,
    *,
    family: str = "uipe",
    stale: str | None = None,
    problem: str | None = None,
) -> Row:
    given_ = {FQ: quality, MU: utility}
    scores = {metric: value for metric, value in given_.items() if value is not None}
    return Row(name, family, alpha, scores, stale, problem)


UNLEARNED = row("u", 0.0, 1e-9, 0.6, family="reference")
ORIGINAL = row("o", -1.0, 1e-20, 0.65, family="reference")
GRID = [
    UNLEARNED,
    ORIGINAL,
    row("a", 0.5, 1e-4, 0.59),
    row("b", 1.0, 1e-2, 0.58),
    row("c", 2.0, 0.5, 0.4),
]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("model_utility>=0.95*unlearned", (MU, ">=", 0.95, "unlearned")),
        (" Model Utility <= 1e-3 * retain ", (MU, "<=", 0.001, "retain")),
        ("mmlu/acc>.5", ("mmlu_acc", ">", 0.5, None)),
        ("privleak<-5.", ("privleak", "<", -5.0, None)),
        ("x>=+2*original", ("x", ">=", 2.0, "original")),
        ("exact_match,strict-match>0", ("exact_match_strict_match", ">", 0.0, None)),
    ],
)
def test_constraints(text: str, meant: tuple[str, str, float, str | None]) -> None:
    constraint = parse_constraint(text)
    assert constraint == Constraint(*meant)
    assert parse_constraint(str(constraint)) == constraint


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model_utility",
        "model_utility>=",
        ">=0.5",
        "model_utility=>0.5",
        "model_utility==0.5",
        "model_utility>=0.95*",
        "model_utility>=unlearned",
        "model_utility>=0.95unlearned",
        "model_utility>=0.95*unlearnt",
        "model_utility>=0.95*unlearned*2",
        "model_utility>=nan",
        "model_utility>=inf",
        "model_utility>=1e999",
        "model_utility>=0x1",
        "model_utility>=1_000",
        "model_utility>=٣",
        "model_utility>=0.5; rm -rf",
        "0.5<=model_utility",
        "0.4<=model_utility<=0.5",
        "a" * 300 + ">=1",
        "a\nb>=1",
        "a\x1b[31m>=1",
    ],
)
def test_what_is_no_constraint_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_constraint(text)
    assert caught.value.exit_code == 3
    message = str(caught.value)
    assert "'model_utility>=0.95*unlearned'" in message
    assert message.isprintable()


@given(st.text(max_size=300))
def test_any_text_is_a_constraint_or_refused(text: str) -> None:
    try:
        constraint = parse_constraint(text)
    except RecipeError:
        return
    assert constraint.metric
    assert math.isfinite(constraint.factor)


def test_the_best_that_keeps_enough_is_chosen() -> None:
    choice = choose(GRID, "Forget Quality", [KEEP])
    assert choice.row is not None
    assert choice.row.name == "b"
    assert choice.reason == (
        "b has the highest forget_quality, 0.01, of the 2 that meet "
        "model_utility>=0.95*unlearned (0.57)"
    )
    assert dict(choice.rejected) == {
        "u": "a reference, to compare with",
        "o": "a reference, to compare with",
        "c": "model_utility is 0.4, not >= 0.57",
    }


def test_the_order_of_the_rows_changes_nothing() -> None:
    expected = choose(GRID, FQ, [KEEP])
    found = choose(GRID[::-1], FQ, [KEEP])
    assert (found.row, found.reason) == (expected.row, expected.reason)


def test_without_a_constraint_nothing_is_chosen_and_why_is_said() -> None:
    on_itself = parse_constraint("forget_quality>=0.05")
    for constraints in ([], [on_itself]):
        choice = choose(GRID, FQ, constraints)
        assert choice.row is None
        assert "nothing is chosen on forget_quality alone" in choice.reason
        assert "model_utility>=0.95*unlearned" in choice.reason
    assert choose(GRID, FQ, [on_itself, parse_constraint("model_utility>0")]).row == GRID[-1]


def test_less_can_be_better() -> None:
    rows = [
        Row("u", "reference", 0.0, {"wmdp": 0.5, "mmlu": 0.6}),
        Row("a", "uipe", 1.0, {"wmdp": 0.3, "mmlu": 0.59}),
        Row("b", "uipe", 2.0, {"wmdp": 0.25, "mmlu": 0.4}),
    ]
    choice = choose(rows, "wmdp", [parse_constraint("mmlu>=0.9*unlearned")], minimise=True)
    assert choice.row == rows[1]
    assert "the lowest wmdp, 0.3, as the only one to meet" in choice.reason
    upper = choose(rows, "mmlu", [parse_constraint("wmdp<=0.6*unlearned")])
    assert upper.row == rows[1]


def test_nobody_meets_the_constraint_and_the_nearest_is_named() -> None:
    choice = choose(GRID, FQ, [parse_constraint("model_utility>=1.0*original")])
    assert choice.row is None
    assert choice.reason == (
        "nothing is chosen: no variant meets model_utility>=1*original; a comes nearest, with "
        "model_utility 0.59 where >= 0.65 is asked (9.2% off)"
    )
    strict = choose(
        [row("a", 1, 0.1, 0.5), row("b", 2, 0.2, 0.5)], FQ, [parse_constraint(f"{MU}>0.5")]
    )
    assert (
        "a comes nearest, with model_utility 0.5 where > 0.5 is asked (0.0% off)" in strict.reason
    )


@pytest.mark.parametrize(
    ("reference", "rows", "said"),
    [
        ("unlearned", GRID[1:], "α = 0 is not in the grid"),
        ("original", GRID[2:], "α = -1 is not in the grid"),
        ("retain", GRID, "the retain-only model is not in the grid"),
        ("unlearned", [row("u", 0.0, 1, None, family="reference"), *GRID[2:]], "u is no reference (has no model_utility)"),
        ("unlearned", [row("u", 0.0, 1, math.nan, family="reference"), *GRID[2:]], "model_utility is nan"),
        ("unlearned", [UNLEARNED._replace(stale="f is older"), *GRID[2:]], "u is no reference (stale: f is older)"),
        ("unlearned", [UNLEARNED._replace(problem="gone"), *GRID[2:]], "u is no reference (gone)"),
        ("unlearned", [UNLEARNED._replace(family="control"), *GRID[2:]], "α = 0 is not in the grid"),
    ],
)  # fmt: skip
def test_a_reference_that_is_missing_is_told(
    reference: str, rows: Sequence[Row], said: str
) -> None:
    choice = choose(rows, FQ, [parse_constraint(f"model_utility>=0.5*{reference}")])
    assert choice.row is None
    assert said in choice.reason
    assert "give a number as the bound" in choice.reason


def test_the_retain_only_model_may_be_the_reference() -> None:
    retain = row("retain", None, 1.0, 0.62, family="reference")
    constraint = parse_constraint("model_utility>=0.95*retain")
    choice = choose([*GRID, retain], FQ, [constraint])
    assert choice.row is not None
    assert choice.row.name == "a"


def test_the_unlearned_model_as_a_step_is_a_reference_too() -> None:
    rows = [row("uipe-0", 0.0, 0.9, 0.6), *GRID[2:]]
    choice = choose(rows, FQ, [KEEP])
    assert choice.row is not None
    assert choice.row.name == "b"
    assert ("uipe-0", "a reference, to compare with") in choice.rejected


def test_an_alpha_of_0_with_rules_is_a_step_like_others() -> None:
    rows = [row("uipe-0", 0.0, 0.9, 0.6)._replace(effective_alpha=0.3), *GRID[2:]]
    assert "α = 0 is not in the grid" in choose(rows, FQ, [KEEP]).reason
    assert choose(rows, FQ, [parse_constraint("model_utility>0.5")]).row == rows[0]


def test_a_number_alone_needs_no_reference() -> None:
    choice = choose(GRID[2:], FQ, [parse_constraint("model_utility>0.5")])
    assert choice.row == GRID[3]


def test_stale_and_broken_models_are_never_chosen() -> None:
    rows = [
        UNLEARNED,
        row("old", 1.0, 0.9, 0.6, stale="s is older"),
        row("half", 2.0, 0.9, 0.6, problem="not finished"),
        row("ok", 0.5, 1e-5, 0.6),
        row("more", 0.7, None, 0.6),
        row("inf", 0.8, math.inf, 0.6),
    ]
    choice = choose(rows, FQ, [KEEP])
    assert choice.row is not None
    assert choice.row.name == "ok"
    assert dict(choice.rejected) == {
        "u": "a reference, to compare with",
        "old": "stale: s is older",
        "half": "not finished",
        "more": "has no forget_quality",
        "inf": "forget_quality is inf",
    }


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no variant is there to choose from"),
        ([UNLEARNED], "no variant is there to choose from"),
        ([row("a", 1, math.nan, 0.6), row("b", 2, math.nan, 0.6)], "forget_quality is not finite for any variant"),
        ([row("a", 1, 0.5, math.nan)], "model_utility is not finite for any variant"),
        ([row("a", 1, None, 0.6)], "no variant has a forget_quality; there is model_utility"),
        ([row("a", 1, 0.1, math.nan), row("b", 2, math.nan, 0.6)], "no variant has all of forget_quality, model_utility"),
    ],
)  # fmt: skip
def test_nothing_to_choose_from(rows: Sequence[Row], said: str) -> None:
    choice = choose(rows, FQ, [parse_constraint("model_utility>0.1")])
    assert choice.row is None
    assert said in choice.reason


def test_a_metric_with_a_slip_is_answered_with_near_names() -> None:
    choice = choose(GRID, "forget_qualty", [KEEP])
    assert "no variant has a forget_qualty; there is forget_quality" in choice.reason


def test_one_alpha_says_little() -> None:
    choice = choose([UNLEARNED, row("a", 1.0, 0.1, 0.6)], FQ, [KEEP])
    assert choice.row is not None
    assert "only one α was scored" in choice.reason


def test_two_of_the_same_alpha_are_told() -> None:
    choice = choose([*GRID, row("b2", 1.0, 0.05, 0.59)], FQ, [KEEP])
    assert choice.row is not None
    assert choice.row.name == "b2"
    assert "b has the same α" in choice.reason


def test_of_equals_the_smaller_alpha_is_taken() -> None:
    rows = [UNLEARNED, row("big", 2.0, 0.5, 0.6), row("small", -1.5, 0.5, 0.58)]
    choice = choose(rows, FQ, [KEEP])
    assert choice.row is not None
    assert choice.row.name == "small"
    assert "big scores the same, and the smaller |α| was taken" in choice.reason
    # Underflow is a tie, not a failure.
    zeros = [UNLEARNED, row("x", 1.0, 0.0, 0.6), row("y", 0.5, 0.0, 0.6)]
    assert choose(zeros, FQ, [KEEP]).row == zeros[2]


def test_the_edge_of_the_grid_is_told() -> None:
    rows = [UNLEARNED, row("a", 0.5, 0.1, 0.6), row("b", 1.0, 0.2, 0.6)]
    assert "the largest of the grid" in choose(rows, FQ, [KEEP]).reason
    assert "the largest" not in choose(GRID, FQ, [KEEP]).reason


def test_an_unlearned_model_that_does_as_well_is_told() -> None:
    rows = [UNLEARNED._replace(scores={FQ: 0.5, MU: 0.6}), *GRID[2:4]]
    assert "warning: the unlearned model itself (u) reaches 0.5" in choose(rows, FQ, [KEEP]).reason


@pytest.mark.parametrize(
    ("alpha", "quality", "said"),
    [
        (1.0, 0.01, "of no larger norm, reaches 0.01 as well"),
        (0.5, 0.9, "of no larger norm, reaches 0.9 as well"),
        (2.0, 0.9, "of a larger norm (α = 2), reaches 0.9 as well"),
        (1.0, 0.009, ""),
        (2.0, math.nan, ""),
    ],
)
def test_a_control_that_forgets_as_much_is_told(alpha: float, quality: float, said: str) -> None:
    control = row("k", alpha, quality, 0.6, family="control")
    choice = choose([*GRID, control], FQ, [KEEP])
    assert choice.row == GRID[3]  # never the control
    assert ("warning: the control k, a random direction" in choice.reason) is bool(said)
    assert said in choice.reason
    stale = choose([*GRID, control._replace(stale="old")], FQ, [KEEP])
    assert "control" not in stale.reason


NUMBERS = st.one_of(
    st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan, math.inf, -math.inf, 5e-324, 1e308]),
    st.floats(),
)
ROWS = st.lists(
    st.builds(
        Row,
        name=st.text(max_size=3),
        family=st.sampled_from(["uipe", "uipe", "uipe", "control", "reference"]),
        alpha=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0]),
        scores=st.fixed_dictionaries({}, optional={FQ: NUMBERS, MU: NUMBERS}),
        stale=st.sampled_from([None, None, None, "old"]),
        problem=st.sampled_from([None, None, None, "gone"]),
        effective_alpha=st.sampled_from([None, 0.0, -1.0]),
    ),
    max_size=8,
)


def could_be_chosen(candidate: Row) -> bool:
    return (
        candidate.family == "uipe"
        and not (
            candidate.alpha in {0.0, -1.0} and candidate.effective_alpha in {None, candidate.alpha}
        )
        and candidate.stale is None
        and candidate.problem is None
        and all(math.isfinite(candidate.scores.get(metric, math.nan)) for metric in (FQ, MU))
    )


@given(ROWS, st.booleans(), st.booleans())
def test_the_front_is_what_brute_force_finds(rows: list[Row], low: bool, below: bool) -> None:
    points = {
        place: (
            candidate.scores[FQ] * (-1 if low else 1),
            candidate.scores[MU] * (-1 if below else 1),
        )
        for place, candidate in enumerate(rows)
        if could_be_chosen(candidate)
    }
    expected = [
        place
        for place, (x, y) in points.items()
        if not any(a >= x and b >= y and (a > x or b > y) for a, b in points.values())
    ]
    found = pareto_front(rows, FQ, MU, minimise=low, over_from_above=below)
    assert len(found) == len(expected)
    assert all(a is rows[place] for a, place in zip(found, expected, strict=True))


@given(
    ROWS,
    st.sampled_from([">=", "<=", ">", "<"]),
    st.sampled_from([0.0, 0.5, 0.95, 1.0, -1.0]),
    st.sampled_from([None, "unlearned", "original"]),
    st.booleans(),
)
def test_the_chosen_meets_the_constraint_and_no_better_one_does(
    rows: list[Row], sign: str, factor: float, reference: str | None, low: bool
) -> None:
    constraint = Constraint(MU, sign, factor, reference)
    choice = choose(rows, FQ, [constraint], minimise=low)
    assert choice.reason
    bound = constraint.bound(rows)
    eligible = [
        candidate
        for candidate in rows
        if could_be_chosen(candidate) and constraint.holds(candidate.scores[MU], bound)
    ]
    if choice.row is None:
        assert eligible == []
        return
    chosen = choice.row
    assert any(chosen is candidate for candidate in eligible)
    best = (min if low else max)(candidate.scores[FQ] for candidate in eligible)
    assert chosen.scores[FQ] == best
    ties = [abs(other.alpha or 0) for other in eligible if other.scores[FQ] == best]
    assert abs(chosen.alpha or 0) == min(ties)
