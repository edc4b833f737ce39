"""Put the studies of several seeds side by side: means and spread, a picture, equal forgetting.

python examples/tofu_small/summarise.py OUT [OUT …] --output DIR

Writes DIR/summary.csv, DIR/equal_forgetting.csv and DIR/tradeoff.png from OUT/study-METHOD.csv.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import statistics
from collections import defaultdict
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import shared

from uipe_merge.study.metrics import log10_floor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

FAMILIES = ("plain", "away", "energy", "mlp", "add", "longer", "control")
REFERENCES = ("full", "retain")
METRICS = ("log10_forget_quality", "model_utility", "forget_probability", "forget_rouge")
MEASURES = {"log10_forget_quality": 1, "forget_probability": -1, "forget_rouge": -1}
"""What tells of forgetting; where less of it is more forgetting, -1."""
DRAWN = ("log10_forget_quality", "forget_rouge")
# Okabe and Ito's colours, told apart by the colour-blind.
COLOURS = ("#0072B2", "#009E73", "#56B4E9", "#CC79A7", "#D55E00", "#000000", "#E69F00")
MARKERS = "oDv^sPX"


class Row(NamedTuple):
    """One evaluated model.

    Attributes:
        seed: Of the training.
        method: What unlearned it, or by what the study of a reference is named.
        family: What step was added; ``full`` and ``retain`` for the references.
        alpha: Its α; NaN for the retain-only model.
        values: By name of ``METRICS``.
    """

    seed: int
    method: str
    family: str
    alpha: float
    values: dict[str, float]

    def forgetting(self, measure: str) -> float:
        """Return what is more where more was forgotten."""
        return MEASURES[measure] * self.values[measure]

    @property
    def utility(self) -> float:
        """Model utility."""
        return self.values["model_utility"]


def main() -> None:
    """Write the two tables and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("outs", type=Path, metavar="OUT", nargs="+", help="a directory a seed")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    given = parser.parse_args()
    rows = [row for out in given.outs for row in read(out)]
    keys = [(row.seed, row.method, row.family, row.alpha) for row in rows]
    if len(set(keys)) < len(keys):
        shared.stop("two of the directories are of the same seed")
    write(given.output / "summary.csv", summary(rows))
    equal = [line for measure in MEASURES for line in equal_forgetting(rows, measure)]
    write(given.output / "equal_forgetting.csv", equal)
    shared.write_changed(given.output / "tradeoff.png", picture(rows))
    print(f"{len(rows)} models of {len({row.seed for row in rows})} seeds: {given.output}")


def read(out: Path) -> list[Row]:
    """Return what was found of one seed."""
    paths = sorted(out.glob("study-*.csv"))
    if not paths:
        shared.stop(f"{out} has no study-METHOD.csv; run study.py first")
    rows = []
    for path in paths:
        method = path.stem.removeprefix("study-")
        with path.open(encoding="utf-8", newline="") as file:
            for record in csv.DictReader(file):
                values = {name: number(record[name]) for name in METRICS[1:]}
                quality = number(record["forget_quality"])
                values[METRICS[0]] = log10_floor(quality)
                alpha = number(record["alpha"])
                rows.append(Row(int(record["seed"]), method, record["family"], alpha, values))
    return rows


def number(text: str) -> float:
    """Return the number in a cell; NaN for an empty one."""
    return float(text) if text else math.nan


def write(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write a table, unless it is there as it is."""
    listed = list(rows)
    text = io.StringIO()
    if listed:
        writer = csv.DictWriter(text, list(listed[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {
                name: f"{value:.6g}" if isinstance(value, float) else value
                for name, value in each.items()
            }
            for each in listed
        )
    shared.write_changed(path, text.getvalue())


def spread(values: Sequence[float]) -> float | str:
    """Return the standard deviation between seeds; nothing for one seed."""
    return statistics.stdev(values) if len(values) > 1 else ""


def summary(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Return mean and standard deviation over seeds, of every method, family and α."""
    groups = grouped(rows)
    found = []
    for (method, family, alpha), mine in groups.items():
        line: dict[str, object] = {
            "method": method,
            "family": family,
            "alpha": "" if math.isnan(alpha) else alpha,
            "seeds": len(mine),
        }
        for name in METRICS:
            values = [row.values[name] for row in mine]
            line[f"{name}_mean"] = statistics.fmean(values)
            line[f"{name}_sd"] = spread(values)
        found.append(line)
    return found


def grouped(rows: Sequence[Row]) -> dict[tuple[str, str, float], list[Row]]:
    """Return the models of all seeds by method, family and α, in the order of a table."""
    order = [*REFERENCES, *FAMILIES]
    found: dict[tuple[str, str, float], list[Row]] = defaultdict(list)
    nan = math.nan  # one and the same: it is found again as part of a key
    for row in sorted(rows, key=lambda row: (row.method, order.index(row.family))):
        found[row.method, row.family, nan if math.isnan(row.alpha) else row.alpha].append(row)
    return {
        key: found[key]
        for key in sorted(found, key=lambda key: (key[0], order.index(key[1]), key[2]))
    }


def equal_forgetting(rows: Sequence[Row], measure: str) -> list[dict[str, object]]:
    """Return the utility of every family where it forgets as much as the plain step does.

    For each α of the plain step, by seed: the forgetting that it reaches is a level, and
    another family's utility at that level is read off its path from the unlearned model over
    growing α, by a straight line between neighbours, where the path first rises through the
    level. A seed counts where the plain step forgets more than the unlearned model, and the
    family gets as far.
    """
    found = []
    for method in sorted({row.method for row in rows}):
        paths: dict[tuple[int, str], list[Row]] = defaultdict(list)
        for row in sorted(rows, key=lambda row: row.alpha):
            if row.method == method and row.family in FAMILIES:
                paths[row.seed, row.family].append(row)
        seeds = sorted({seed for seed, _ in paths})
        alphas = sorted({row.alpha for row in rows if row.family == "plain" and row.alpha > 0})
        for alpha, family in product(alphas, FAMILIES[1:]):
            pairs = [
                pair
                for seed in seeds
                for pair in at_level(paths[seed, "plain"], paths[seed, family], alpha, measure)
            ]
            gains = [utility - level.utility for level, utility in pairs]
            found.append(
                {
                    "measure": measure,
                    "method": method,
                    "plain_alpha": alpha,
                    "family": family,
                    "seeds": len(seeds),
                    "seeds_counted": len(pairs),
                    "level": mean([level.values[measure] for level, _ in pairs]),
                    "plain_utility": mean([level.utility for level, _ in pairs]),
                    "utility": mean([utility for _, utility in pairs]),
                    "difference": mean(gains),
                    "difference_sd": spread(gains),
                }
            )
    return found


def at_level(
    plain: Sequence[Row], path: Sequence[Row], alpha: float, measure: str
) -> list[tuple[Row, float]]:
    """Return the plain step at α and the utility of another path there; nothing if it is none."""
    level = next((row for row in plain if row.alpha == alpha), None)
    start = next((row for row in plain if row.alpha == 0), None)
    if level is None or start is None:
        return []
    reached = level.forgetting(measure)
    if not reached > start.forgetting(measure):
        return []
    whole = [start, *path] if path and path[0].alpha > 0 else path
    utility = crossing(whole, reached, measure)
    return [] if utility is None else [(level, utility)]


def mean(values: Sequence[float]) -> float | str:
    """Return the mean; nothing of nothing."""
    return statistics.fmean(values) if values else ""


def crossing(path: Sequence[Row], level: float, measure: str) -> float | None:
    """Return the utility where a path first rises through a level; None if it never does."""
    for low, high in pairwise(path):
        below, above = low.forgetting(measure), high.forgetting(measure)
        if below < level <= above:
            share = (level - below) / (above - below)
            return low.utility + share * (high.utility - low.utility)
    return None


def picture(rows: Sequence[Row]) -> bytes:
    """Return a PNG: forgetting against utility, a column a method, bars for the spread."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.use("agg")
    methods = sorted({row.method for row in rows})
    figure, panels = plt.subplots(
        len(DRAWN),
        len(methods),
        figsize=(1.5 + 3.5 * len(methods), 7.5),
        squeeze=False,
        sharex=True,
        sharey="row",
    )
    groups = grouped(rows)
    for measure, line in zip(DRAWN, panels, strict=True):
        for axes, method in zip(line, methods, strict=True):
            draw(axes, groups, method, measure)
        line[0].set_ylabel(measure.replace("_", " "))
        if MEASURES[measure] < 0:
            line[0].invert_yaxis()  # up is more forgetting in both
    for axes, method in zip(panels[0], methods, strict=True):
        axes.set_title(method)
    for axes in panels[-1]:
        axes.set_xlabel("model utility")
    seeds = len({row.seed for row in rows})
    said = f"{seeds} seeds, bars: standard deviation" if seeds > 1 else "one seed"
    named = panels[0][-1].get_legend_handles_labels()
    figure.legend(*named, title=said, loc="upper center", ncols=len(named[1]), fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=110)
    plt.close(figure)
    return held.getvalue()


def draw(
    axes: Any,  # noqa: ANN401 - matplotlib's
    groups: dict[tuple[str, str, float], list[Row]],
    method: str,
    measure: str,
) -> None:
    """Draw the paths of one method's families, and the references."""
    for family, colour, marker in zip(FAMILIES, COLOURS, MARKERS, strict=True):
        starts = family not in {"plain", "add"}
        mine = [
            place(members, measure)
            for (whose, which, alpha), members in groups.items()
            if (whose, which) == (method, family)
            or (starts and (whose, which, alpha) == (method, "plain", 0))
        ]
        if mine:
            mine.sort(key=lambda point: point["alpha"])
            bars(axes, mine, color=colour, marker=marker, linewidth=1, label=family)
    for family, marker in zip(REFERENCES, "x*", strict=True):
        mine = [
            place(members, measure)
            for key, members in groups.items()
            if key[:2] == (method, family)
        ]
        bars(axes, mine, color="0.4", marker=marker, linestyle="none", label=family)
    axes.grid(visible=True, color="0.92")


def place(members: Sequence[Row], measure: str) -> dict[str, float]:
    """Return where the seeds of one point lie, and how far apart."""
    found = {"alpha": members[0].alpha}
    for name, values in (
        ("x", [row.utility for row in members]),
        ("y", [row.values[measure] for row in members]),
    ):
        found[name] = statistics.fmean(values)
        found[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return found


def bars(axes: Any, points: Sequence[dict[str, float]], **style: Any) -> None:  # noqa: ANN401 - matplotlib's
    """Draw points with bars where there is a spread."""
    columns = {name: [point[name] for point in points] for name in ("x", "y", "x_sd", "y_sd")}
    axes.errorbar(
        columns["x"], columns["y"], xerr=columns["x_sd"], yerr=columns["y_sd"], capsize=2, **style
    )


if __name__ == "__main__":
    main()
