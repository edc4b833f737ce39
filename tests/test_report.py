"""report.py: sums, what follows from them, and what a run tells about itself."""

import json
import math
import random
from collections.abc import Mapping
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uipe_merge.checkpoint.dtypes import DTYPES
from uipe_merge.checkpoint.header import TensorSpec
from uipe_merge.plan import Operation, Step
from uipe_merge.report import (
    Summary,
    Sums,
    add,
    exact_sum,
    quotient,
    root,
    summarise,
    tensor_record,
)


def step(name: str, operation: Operation, elements: int, dtype: str = "BF16") -> Step:
    kind = DTYPES[dtype]
    nbytes = elements * kind.bits // 8
    spec = TensorSpec(name, kind, (elements,), "model.safetensors", 0, nbytes)
    return Step(name, operation, 2.0, spec, spec, kind, 0, nbytes, from_original=False)


def summary(total: Sums | None, *, alpha: float = 2.0, elements: int = 10) -> Summary:
    return Summary(alpha, {"extrapolate": (3, 60), "copy": (1, 8)}, 1, total, elements)


# ---------------------------------------------------------------- sums


def test_measures_of_a_group_follow_from_its_sums() -> None:
    # v = (3, 4), θᵤ = (6, 8), α = 2 and θ_out − θᵤ = (6, 7): 1 short in one element
    sums = Sums(update=25.0, unlearned=100.0, along=46.0, error=1.0, changed=2).of_plain(2.0)
    assert sums.norm == 5
    assert sums.ratio == 0.5
    assert sums.effective_alpha == pytest.approx(46 / 25)
    assert sums.asked_alpha == 2
    assert sums.rounding_error == pytest.approx(1 / 10)
    assert sums.kept == pytest.approx(92 / 100)
    assert sums.of_plain(-2.0).rounding_error == pytest.approx(1 / 10)


def test_measures_of_a_step_that_is_no_multiple_of_the_update() -> None:
    # v = (3, 4), θᵤ = (6, 8), s = (4, -3) + v/2 = (5.5, -1) and θ_out − θᵤ = (5, −1)
    sums = Sums(25.0, 100.0, 11.0, 0.25, 2, 31.25, 12.5, 28.5)
    assert sums.norm == 5
    assert sums.effective_alpha == pytest.approx(11 / 25)
    assert sums.asked_alpha == pytest.approx(1 / 2)
    assert sums.rounding_error == pytest.approx((0.25 / 31.25) ** 0.5)
    assert sums.kept == pytest.approx(28.5 / 31.25)


@given(st.floats(-4, 4), st.lists(st.tuples(*[st.floats(-2, 2)] * 3), min_size=1, max_size=9))
def test_where_the_step_is_alpha_times_the_update_the_other_sums_follow(
    alpha: float, rows: list[tuple[float, float, float]]
) -> None:
    """Each row: v, θᵤ and θ_out − θᵤ of one element."""
    update = sum(v * v for v, _, _ in rows)
    found = Sums(
        update,
        sum(theta * theta for _, theta, _ in rows),
        sum(moved * v for v, _, moved in rows),
        sum((moved - alpha * v) ** 2 for v, _, moved in rows),
        sum(moved != 0 for _, _, moved in rows),
    ).of_plain(alpha)
    assert found.step == pytest.approx(sum((alpha * v) ** 2 for v, _, _ in rows))
    assert found.asked == pytest.approx(sum(alpha * v * v for v, _, _ in rows))
    realised = sum(moved * alpha * v for v, _, moved in rows)
    assert found.realised == pytest.approx(realised, abs=1e-9)


def test_where_there_is_nothing_to_divide_by_there_is_no_measure() -> None:
    nothing = Sums()
    assert nothing.norm == 0
    assert nothing.ratio is nothing.effective_alpha is nothing.rounding_error is None
    assert nothing.asked_alpha is nothing.kept is None
    still = Sums(update=1.0, unlearned=1.0).of_plain(0.0)
    assert still.rounding_error is still.kept is None
    assert still.asked_alpha == 0


@pytest.mark.parametrize("column", [0, 1, 2, 3, 5, 6, 7])
def test_a_sum_that_overflowed_gives_no_measure(column: int) -> None:
    values = [1.0, 1.0, 1.0, 1.0, 1, 1.0, 1.0, 1.0]
    values[column] = math.inf
    sums = Sums(*values)
    measures = [sums.norm, sums.ratio, sums.effective_alpha, sums.rounding_error]
    measures += [sums.asked_alpha, sums.kept]
    assert all(measure is None or math.isfinite(measure) for measure in measures)
    lost = {0: [0, 1, 2, 4], 1: [1], 2: [2], 3: [3], 5: [3, 5], 6: [4], 7: [5]}[column]
    assert [number for number, measure in enumerate(measures) if measure is None] == lost


finite = st.floats(allow_nan=False, allow_infinity=False, width=64)


@given(st.lists(finite, max_size=30), st.randoms(use_true_random=False))
def test_a_sum_is_exactly_rounded_in_any_order(values: list[float], order: random.Random) -> None:
    exact = sum(map(Fraction, values), Fraction())
    try:
        wanted = float(exact)
    except OverflowError:
        wanted = math.inf
    shuffled = list(values)
    order.shuffle(shuffled)
    if max(map(abs, values), default=0.0) < 1e300:  # nothing can overflow on the way
        assert exact_sum(values) == exact_sum(shuffled) == wanted
    else:
        assert exact_sum(shuffled) in (wanted, math.inf)


@pytest.mark.parametrize(
    "column",
    [
        [1e308, 1e308],
        [math.inf, 1.0],
        [-math.inf],
        [math.inf, -math.inf],
        [math.nan],
        [1e308, 1e308, -math.inf],
    ],
)
def test_a_sum_with_no_finite_value_is_infinite(column: list[float]) -> None:
    assert exact_sum(column) == math.inf


def test_adding_groups_adds_every_column() -> None:
    one = Sums(1.0, 2.0, 3.0, 4.0, 5, 6.0, 7.0, 8.0)
    two = Sums(10.0, 20.0, 30.0, 40.0, 50, 60.0, 70.0, 80.0)
    assert add([one, two]) == Sums(11.0, 22.0, 33.0, 44.0, 55, 66.0, 77.0, 88.0)
    assert add(iter([one])) == one


def test_root_and_quotient_pass_on_that_there_is_no_number() -> None:
    assert root(9.0) == 3
    assert root(None) is root(math.inf) is root(math.nan) is None
    assert quotient(1.0, 4.0) == 0.25
    for one, two in ((1.0, 0.0), (math.inf, 1.0), (1.0, math.inf), (math.nan, 1.0)):
        assert quotient(one, two) is None


# ---------------------------------------------------------------- over a model


STEPS = [
    step("moved", "extrapolate", 30),
    step("still", "extrapolate", 10),
    step("complex", "extrapolate", 5, "C64"),
    step("ids", "keep", 4, "I64"),
    step("norm", "copy", 7),
]
SUMS: Mapping[str, Sums | None] = {
    "moved": Sums(4.0, 16.0, 8.0, 0.0, 24).of_plain(2.0),
    "still": Sums(0.0, 9.0, 0.0, 0.0, 0).of_plain(2.0),
    "complex": Sums(5.0, 11.0, 10.0, 0.0, 10).of_plain(2.0),
    "ids": Sums(changed=3),
    "norm": None,
}


def test_a_model_is_the_sum_of_its_extrapolated_tensors() -> None:
    found = summarise(STEPS, SUMS, 0.0)
    assert found.tensors == {"extrapolate": (3, 120), "keep": (1, 32), "copy": (1, 14)}
    assert found.unchanged == 1
    assert found.elements == 30 + 10 + 2 * 5  # a complex number is two real ones
    assert found.total == Sums(9.0, 36.0, 18.0, 0.0, 34).of_plain(2.0)
    assert found.as_dict() == {
        "alpha": 2.0,
        "alpha_spread": None,
        "tensors": {
            "extrapolate": {"count": 3, "bytes": 120},
            "keep": {"count": 1, "bytes": 32},
            "copy": {"count": 1, "bytes": 14},
        },
        "unchanged": 1,
        "norm": 3.0,
        "ratio": 0.5,
        "effective_alpha": 2.0,
        "share_kept": 1.0,
        "rounding_error": 0.0,
        "share_changed": 34 / 50,
    }


def test_a_model_of_copies_has_no_measures_and_no_warnings() -> None:
    found = summarise(STEPS[3:], SUMS, 0.0)
    assert found.total is None
    assert found.warnings() == []
    assert [name for name, _ in found.rows()] == ["tensors extrapolated", "tensors copied"]
    assert found.as_dict()["norm"] is found.as_dict()["share_changed"] is None
    assert summarise([], {}, 0.0).rows()[0] == ("tensors extrapolated", "0 (0 with v = 0)")


def test_the_closing_table_shows_what_was_asked_for_and_what_came_out() -> None:
    rows = dict(summary(Sums(4.0, 16.0, 7.6, 0.16, 9).of_plain(2.0)).rows())
    assert rows == {
        "tensors extrapolated": "3 (1 with v = 0)",
        "tensors copied": "1",
        "‖v‖/‖θᵤ‖": "5.000e-01",
        "α asked / effective": "2 / 1.9",
        "rounding error ‖θ−θᵤ−αv‖/‖αv‖": "0.1",
        "elements changed": "90.00%",
    }
    empty = dict(summary(Sums(), elements=0).rows())
    assert empty["‖v‖/‖θᵤ‖"] == "–"
    assert empty["α asked / effective"] == "2 / –"


@pytest.mark.parametrize(
    ("alpha", "along", "warns"),
    [
        (2.0, 8.0, False),
        (2.0, 7.7, False),  # 3.75 % short
        (2.0, 7.5, True),  # 6.25 % short
        (2.0, 8.5, True),  # 6.25 % beyond
        (0.1, 0.0, True),
        (-0.5, -2.0, False),
        (-0.5, -1.0, True),
    ],
)
def test_an_effective_alpha_off_by_more_than_5_percent_is_warned_of(
    alpha: float, along: float, warns: bool
) -> None:
    total = Sums(4.0, 16.0, along, 0.0, 4).of_plain(alpha)
    warnings = summary(total, alpha=alpha).warnings()
    assert len(warnings) == warns
    if warns:
        assert f"effective α of {along / 4:.4g} where {alpha:g} was asked for" in warnings[0]
        assert "(60% of the elements did not change)" in warnings[0]
        assert "--dtype float32" in warnings[0]


def test_identical_checkpoints_are_warned_of_and_empty_ones_are_not() -> None:
    (warning,) = summary(Sums(0.0, 4.0, 0.0, 0.0, 0)).warnings()
    assert "identical weights" in warning
    assert summary(Sums(), elements=0).warnings() == []
    infinite = Sums(math.inf, math.inf, math.inf, math.inf, 3).of_plain(2.0)
    assert summary(infinite).warnings() == []


def test_a_steered_run_speaks_of_its_step() -> None:
    # ⟨s, v⟩ = 0: no α can be compared, and rounding left a tenth of the step
    total = Sums(4.0, 16.0, 0.0, 0.81, 4, 1.0, 0.0, 0.1)
    found = Summary(1.0, {"extrapolate": (3, 60)}, 0, total, 10, steered=True)
    rows = dict(found.rows())
    assert rows["rounding error ‖θ−θᵤ−s‖/‖s‖"] == "0.9"
    (warning,) = found.warnings()
    assert "leaves 10.0% of the step (60% of the elements did not change)" in warning
    assert "effective α" not in warning
    assert found.as_dict()["share_kept"] == 0.1
    whole = Sums(4.0, 16.0, 2.0, 0.0, 9, 4.0, 1.0, 3.9)  # 2.5 % short
    assert Summary(1.0, {}, 0, whole, 10, steered=True).warnings() == []


def test_identical_checkpoints_that_something_is_added_to_are_not_the_output() -> None:
    total = Sums(0.0, 16.0, 0.0, 0.0, 9, 4.0, 0.0, 4.0)
    found = Summary(1.0, {"extrapolate": (3, 60)}, 3, total, 10, steered=True)
    assert not any("the output equals both" in warning for warning in found.warnings())


def test_the_record_of_a_tensor_has_what_its_operation_measures() -> None:
    records = {each.name: tensor_record(each, SUMS[each.name]) for each in STEPS}
    assert records["moved"] == {
        "operation": "extrapolate",
        "alpha": 2.0,
        "norm": 2.0,
        "ratio": 0.5,
        "effective_alpha": 2.0,
        "rounding_error": 0.0,
        "share_changed": 0.8,
    }
    assert records["still"]["effective_alpha"] is records["still"]["rounding_error"] is None
    assert records["complex"]["share_changed"] == 1.0
    assert records["ids"] == {"operation": "keep", "alpha": 2.0, "share_differing": 0.75}
    assert records["norm"] == {"operation": "copy", "alpha": 2.0, "source": "unlearned"}
    assert tensor_record(step("e", "extrapolate", 0), Sums())["share_changed"] == 0
    assert json.loads(json.dumps(records, allow_nan=False)) == records
