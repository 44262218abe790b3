"""Output of ``pass-rates --simulate``: a table, the gains in a sentence, CSV and figures."""

from __future__ import annotations

import csv
from html import escape
from pathlib import Path

from rich.table import Table

from nemo_paced.files import write_whole
from nemo_paced.report import figures
from nemo_paced.report.drawing import Line
from nemo_paced.weights.simulation import (
    MAX_ROLLOUTS,
    MIN_ROLLOUTS,
    REFERENCE_ROLLOUTS,
    Curves,
    mean_and_error,
)

ESTIMATORS = ("plug-in", "posterior", "adaptive")


def error_table(name: str, curves: Curves) -> Table:
    """Table of RMS errors by rollouts a problem, mean ± standard error over seeds."""
    table = Table(title=f"RMS error of unit-mean weights, pass rates: {name}", title_justify="left")
    table.add_column("rollouts a problem", justify="right")
    for estimator in ESTIMATORS:
        table.add_column(estimator, justify="right")
    for column, rollouts in enumerate(curves.rollouts):
        cells = [mean_and_error(curves.errors[e][:, column]) for e in ESTIMATORS]
        table.add_row(str(rollouts), *(f"{mean:.3f} ± {error:.3f}" for mean, error in cells))
    return table


def gain_lines(curves: Curves) -> list[str]:
    """Sentences on what the posterior saves, and on what adaptivity saves beyond it."""
    reference = f"K = {REFERENCE_ROLLOUTS}"
    return [
        f"rollouts saved at the plug-in's error of {reference}: posterior "
        f"{_share(curves, 'posterior', 'plug-in')}, adaptive "
        f"{_share(curves, 'adaptive', 'plug-in')}",
        f"rollouts saved at the posterior's error of {reference}, which is adaptivity alone: "
        f"{_share(curves, 'adaptive', 'posterior')}",
    ]


def _share(curves: Curves, estimator: str, against: str) -> str:
    mean, error = curves.saving(estimator, against)
    needed = curves.needed(estimator, against)
    if mean != mean:
        return f"none (it needs more than {MAX_ROLLOUTS})"
    floor = (needed <= MIN_ROLLOUTS).mean() > 0.5
    note = f" or more ({MIN_ROLLOUTS} rollouts a problem are enough)" if floor else ""
    return f"{100 * mean:.0f} % ± {100 * error:.0f}{note}"


def write_csv(path: Path, results: dict[str, Curves]) -> None:
    """Write RMS errors as CSV, one line a distribution, estimator, budget and seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["pass_rates", "estimator", "rollouts", "seed", "rms_error"])
        for name, curves in results.items():
            for estimator in ESTIMATORS:
                for seed, errors in enumerate(curves.errors[estimator]):
                    for rollouts, error in zip(curves.rollouts, errors, strict=True):
                        writer.writerow([name, estimator, int(rollouts), seed, f"{error:.6f}"])


def write_figures(path: Path, results: dict[str, Curves]) -> None:
    """Write an HTML page, one figure a distribution; dashed: the plug-in's error at K = 8."""
    parts = []
    for name, curves in results.items():
        lines: list[Line] = []
        for estimator in ESTIMATORS:
            cells = [mean_and_error(column) for column in curves.errors[estimator].T]
            means, errors = [mean for mean, _ in cells], [error for _, error in cells]
            lines.append(
                Line(estimator, curves.rollouts.tolist(), means, errors, colour=len(lines))
            )
        goal = lines[0].values[REFERENCE_ROLLOUTS - MIN_ROLLOUTS]
        parts.append(f"<h2>{escape(name)}</h2>\n{figures.weight_errors(lines, goal)}")
    title = "Error of the weights against rollouts"
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
    write_whole(path, f"{head}\n<h1>{title}</h1>\n" + "\n".join(parts) + "\n</html>\n")
