"""Figures of a run as inline SVG: plain matplotlib, one idea each, axes with units."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

BLUE, ORANGE, GREEN, GREY = "#2563a8", "#d9731a", "#2f8f4e", "#8a8f98"
_STYLE: dict[Any, Any] = {
    "figure.figsize": (6.4, 3.2),
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.fonttype": "none",
}


def pass_rate_histogram(tables: dict[str, Sequence[float]]) -> str:
    """Pass rates of each estimate (label -> pass rates) in ten bins."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots()
        bins = np.linspace(0, 1, 11).tolist()
        values = [np.clip(rates, 0, 1) for rates in tables.values()]
        axes.hist(values, bins=bins, label=list(tables), color=[GREY, BLUE, ORANGE][: len(values)])
        axes.set(xlabel="pass rate", ylabel="problems", xticks=np.linspace(0, 1, 6))
        axes.legend(frameon=False)
        return _svg(figure)


def weights_by_pass_rate(pass_rates: Sequence[float], weights: Sequence[float]) -> str:
    """What each pass rate weighs, and how much of the total weight it holds."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots()
        rates = np.asarray(pass_rates)
        values = np.asarray(weights)
        levels = np.unique(rates)
        width = 0.8 * np.min(np.diff(levels)) if len(levels) > 1 else 0.08
        share = [values[rates == level].sum() / values.sum() for level in levels]
        axes.bar(levels, share, width=width, color=GREY, label="share of all weight")
        twin = axes.twinx()
        twin.plot(levels, [values[rates == level].mean() for level in levels], "o-", color=BLUE)
        twin.set_ylabel("weight (mean 1)", color=BLUE)
        twin.grid(visible=False)
        axes.set(xlabel="pass rate", ylabel="share of all weight")
        return _svg(figure)


def curves(rows: Sequence[dict[str, Any]], key: str, ylabel: str, *, log: bool = False) -> str:
    """One metric against the step, a colour a stage."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots()
        stages = list(dict.fromkeys(row["stage"] for row in rows))
        for stage, colour in zip(stages, (BLUE, ORANGE, GREEN, GREY) * 3, strict=False):
            points = [(r["step"], r[key]) for r in rows if r["stage"] == stage and _has(r, key)]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, lw=1.4, label=stage,
                          marker="." if len(points) < 40 else None)  # fmt: skip
        if log:
            axes.set_yscale("log")
        axes.set(xlabel="optimizer step", ylabel=ylabel)
        axes.legend(frameon=False)
        return _svg(figure)


def drift(tables: dict[int, Sequence[float]]) -> str:
    """Shares of problems below 0.2, between and above 0.8, and the mean, by student step."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots()
        steps = sorted(tables)
        below = [float(np.mean(np.asarray(tables[s]) < 0.2)) for s in steps]
        above = [float(np.mean(np.asarray(tables[s]) > 0.8)) for s in steps]
        middle = [1 - b - a for b, a in zip(below, above, strict=True)]
        positions = np.arange(len(steps))
        axes.bar(positions, below, 0.6, color=ORANGE, label="below 0.2")
        axes.bar(positions, middle, 0.6, bottom=below, color=BLUE, label="0.2 to 0.8")
        bottom = [b + m for b, m in zip(below, middle, strict=True)]
        axes.bar(positions, above, 0.6, bottom=bottom, color=GREEN, label="above 0.8")
        means = [float(np.mean(tables[s])) for s in steps]
        axes.plot(positions, means, "ko", label="mean pass rate")
        axes.set(
            xticks=positions, xticklabels=[f"step {s}" for s in steps], ylabel="share", ylim=(0, 1)
        )
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        return _svg(figure)


def timing(rows: Sequence[dict[str, Any]]) -> str:
    """Where the wall time of all steps went, by stage."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 2.2))
        stages = list(dict.fromkeys(row["stage"] for row in rows))
        parts = ("teacher", "student", "rollout", "refit", "checkpoint")
        left = np.zeros(len(stages))
        colours = (BLUE, GREEN, ORANGE, "#b2508c", GREY)
        for part, colour in zip(parts, colours, strict=True):
            seconds = np.array(
                [sum(r.get(f"time/{part}_s") or 0 for r in rows if r["stage"] == s) for s in stages]
            )
            axes.barh(stages, seconds, left=left, color=colour, label=part)
            left += seconds
        axes.set(xlabel="seconds, all steps of the stage")
        axes.legend(frameon=False, ncols=5, loc="lower center", bbox_to_anchor=(0.45, 1))
        return _svg(figure)


def accuracy_bars(labels: Sequence[str], suites: dict[str, list[tuple[float, float]]]) -> str:
    """mean@k with its standard error, by model and suite."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots()
        width = 0.8 / len(suites)
        for index, (suite, values) in enumerate(suites.items()):
            positions = np.arange(len(labels)) + (index - (len(suites) - 1) / 2) * width
            means, errors = zip(*values, strict=True)
            colour = (BLUE, GREY, GREEN)[index % 3]
            axes.bar(
                positions, means, width * 0.92, yerr=errors, capsize=3, color=colour, label=suite
            )
        axes.set(xticks=np.arange(len(labels)), xticklabels=labels, ylabel="mean@k", ylim=(0, 1))
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        return _svg(figure)


def _has(row: dict[str, Any], key: str) -> bool:
    return row.get(key) is not None


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
