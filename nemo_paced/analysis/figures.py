"""Figures of a run as inline SVG: plain matplotlib, one idea each, axes with units.

Text and axes take the page's colour (``currentColor``), so that a figure is readable on a light and
on a dark page; the data colours are chosen for both.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY, PINK = "#3b82c4", "#e07b26", "#3d9a5b", "#8a8f98", "#c0609f"
COLOURS = (BLUE, ORANGE, GREEN, PINK, GREY)
# No figure draws in this colour: it stands for the page's own and is replaced in the SVG.
_INK = "#010203"
_STYLE: dict[Any, Any] = {
    "figure.figsize": (5.2, 3.1),  # about a phone's width in points: text keeps its size there
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.labelsize": 10.5,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.7,
    "grid.color": _INK,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "nemo_paced",  # the same figure gives the same bytes
}
SMOOTHED_OVER = 10  # steps of the trailing mean
FEW_POINTS = 20  # up to so many are marked, and not smoothed
TIMED_PARTS = ("teacher", "student", "rollout", "refit", "checkpoint")


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: values at optimizer steps, with standard errors where there are any."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    errors: Sequence[float] | None = None


def pass_rate_histogram(tables: dict[str, Sequence[float]], num_rollouts: int) -> str:
    """Problems by pass rate, for each estimate (label -> pass rates).

    With K rollouts a pass rate is one of 0/K .. K/K: up to K = 16 each has its own bar (ten equal
    bins would leave gaps and pile two values up in others), above that there are ten bins.
    """
    centres, edges = _bins(num_rollouts)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes()
        width = 0.8 * (edges[1] - edges[0]) / len(tables)
        for index, (label, rates) in enumerate(tables.items()):
            counts, _ = np.histogram(rates, bins=edges)
            shift = (index - (len(tables) - 1) / 2) * width
            colour = (GREY, BLUE)[index] if len(tables) == 2 else BLUE
            axes.bar(centres + shift, counts, width, label=label, color=colour)
        axes.set(xlabel="pass rate of a problem", ylabel="problems", xticks=np.linspace(0, 1, 6))
        _legend(axes)
        return _svg(figure, "Histogram of pass rates")


def weights_by_pass_rate(
    pass_rates: Sequence[float], weights: Sequence[float], num_rollouts: int
) -> str:
    """What a problem of each pass rate weighs (line), and its share of all weight (bars)."""
    rates, values = np.asarray(pass_rates), np.asarray(weights)
    centres, edges = _bins(num_rollouts)
    held, _ = np.histogram(rates, bins=edges, weights=values)
    counts, _ = np.histogram(rates, bins=edges)
    there = counts > 0
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes()
        axes.bar(centres, held / values.sum(), 0.8 * (edges[1] - edges[0]), color=GREY, alpha=0.6)
        axes.set(
            xlabel="pass rate of a problem",
            ylabel="share of all weight (bars)",
            xticks=np.linspace(0, 1, 6),
        )
        twin = axes.twinx()
        twin.plot(centres[there], held[there] / counts[there], "o-", color=BLUE)
        twin.set_ylabel("weight of one problem (line)", color=BLUE)
        twin.tick_params(axis="y", colors=BLUE)
        twin.set_ylim(0, None)
        twin.grid(visible=False)
        twin.spines["right"].set(visible=True, color=BLUE)
        return _svg(figure, "Weights against pass rate")


def curves(lines: Sequence[Line], ylabel: str, *, log: bool = False, share: bool = False) -> str:
    """One metric against the step. Long curves are drawn faint, under their trailing mean.

    Args:
        share: the axis goes from 0 to 1.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes()
        for line, colour in zip(lines, COLOURS * len(lines), strict=False):
            steps, values = np.asarray(line.steps), np.asarray(line.values, dtype=float)
            if log:
                steps, values = steps[values > 0], values[values > 0]
            if line.errors is not None:
                axes.errorbar(
                    steps, values, line.errors, fmt="o-", capsize=3, color=colour, label=line.label
                )
            elif len(steps) <= FEW_POINTS:
                axes.plot(steps, values, ".-", color=colour, lw=1.4, label=line.label)
            else:
                axes.plot(steps, values, color=colour, lw=0.8, alpha=0.4)
                axes.plot(steps, _trailing_mean(values), color=colour, lw=1.8, label=line.label)
        if log:
            axes.set_yscale("log")
        if share:
            axes.set_ylim(-0.02, 1.02)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="optimizer step", ylabel=ylabel)
        _legend(axes)
        return _svg(figure, f"{ylabel} against optimizer step")


def drift(tables: dict[int, Sequence[float]]) -> str:
    """Shares of problems below 0.2, between and above 0.8, and the mean, by student step."""
    steps = sorted(tables)
    rates = [np.asarray(tables[step]) for step in steps]
    below = np.array([np.mean(r < 0.2) for r in rates])
    above = np.array([np.mean(r > 0.8) for r in rates])
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes()
        at = np.arange(len(steps))
        axes.bar(at, below, 0.6, color=ORANGE, label="below 0.2")
        axes.bar(at, 1 - below - above, 0.6, bottom=below, color=BLUE, label="0.2 to 0.8")
        axes.bar(at, above, 0.6, bottom=1 - above, color=GREEN, label="above 0.8")
        means = [float(np.mean(r)) for r in rates]
        axes.plot(at, means, "o-", color=_INK, label="mean pass rate")
        axes.set(
            xticks=at,
            xticklabels=[str(step) for step in steps],
            xlabel="optimizer step of the student",
            ylabel="share of problems; mean",
            ylim=(0, 1),
        )
        axes.grid(visible=False)
        _legend(axes)
        return _svg(figure, "Drift of pass rates")


def timing(seconds: dict[str, dict[str, float]]) -> str:
    """Where the wall time of each stage went: stage -> part -> seconds."""
    stages = list(seconds)
    parts = list(next(iter(seconds.values())))
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(height=1.5 + 0.5 * len(stages))
        left = np.zeros(len(stages))
        for part, colour in zip(parts, (*COLOURS, "#b8b08d"), strict=False):
            widths = np.array([seconds[stage][part] for stage in stages])
            axes.barh(stages, widths, 0.6, left=left, color=colour, label=part)
            left += widths
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set(xlabel="wall time of the stage's steps (s)")
        _legend(axes)
        return _svg(figure, "Wall time by part and stage")


def accuracy_bars(labels: Sequence[str], suites: dict[str, list[tuple[float, float]]]) -> str:
    """mean@k with its standard error, by model and suite: suite -> (mean, s.e.) a model."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes()
        width = 0.8 / len(suites)
        at = np.arange(len(labels))
        for index, (suite, values) in enumerate(suites.items()):
            means, errors = zip(*values, strict=True)
            shift = (index - (len(suites) - 1) / 2) * width
            axes.bar(at + shift, means, width * 0.92, yerr=np.nan_to_num(errors), capsize=3,
                     ecolor=_INK, color=COLOURS[index % len(COLOURS)], label=suite)  # fmt: skip
        axes.set(xticks=at, xticklabels=labels, ylabel="mean@k", ylim=(0, 1))
        if len(labels) > 4:
            axes.tick_params(axis="x", rotation=30)
        axes.grid(visible=False, axis="x")
        _legend(axes)
        return _svg(figure, "Accuracy by model")


def differences(
    labels: Sequence[str], suites: dict[str, list[tuple[float, float]]], reference: str
) -> str:
    """Accuracy minus the reference model's, with two standard errors: an interval each."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(height=1.4 + 0.28 * len(labels) * len(suites))
        at = np.arange(len(labels))
        for index, (suite, values) in enumerate(suites.items()):
            means, errors = zip(*values, strict=True)
            shift = (index - (len(suites) - 1) / 2) * 0.5 / len(suites)
            axes.errorbar(means, at + shift, xerr=2 * np.nan_to_num(errors), fmt="o", capsize=3,
                          color=COLOURS[index % len(COLOURS)], label=suite)  # fmt: skip
        axes.axvline(0, color=_INK, lw=1)
        axes.set(
            yticks=at,
            yticklabels=labels,
            ylim=(len(labels) - 0.5, -0.5),
            xlabel=f"mean@k minus {reference}, ± 2 standard errors",
        )
        axes.grid(visible=False, axis="y")
        _legend(axes)
        return _svg(figure, f"Accuracy minus that of {reference}")


def weight_errors(lines: Sequence[Line], goal: float) -> str:
    """RMS error of the weights against rollouts a problem (the lines' steps), and a goal."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes()
        for line, colour in zip(lines, COLOURS, strict=False):
            axes.errorbar(
                line.steps, line.values, line.errors, fmt=".-", color=colour, label=line.label
            )
        axes.axhline(goal, color=GREY, lw=0.8, ls="--")
        axes.set(xlabel="rollouts a problem, mean", ylabel="RMS error of a weight", ylim=(0, None))
        _legend(axes)
        return _svg(figure, "RMS error of the weights against rollouts a problem")


def _bins(num_rollouts: int) -> tuple[Any, Any]:
    """(centres, edges) of the bars over pass rates."""
    if num_rollouts <= 16:
        centres = np.linspace(0, 1, num_rollouts + 1)
        half = 0.5 / num_rollouts
        return centres, np.append(centres - half, 1 + half)
    edges = np.linspace(0, 1, 11)
    return (edges[1:] + edges[:-1]) / 2, edges


def _trailing_mean(values: Any) -> Any:
    return [values[max(0, end - SMOOTHED_OVER) : end].mean() for end in range(1, len(values) + 1)]


def _axes(height: float | None = None) -> tuple[Figure, Any]:
    figure = Figure()
    if height is not None:
        figure.set_size_inches(_STYLE["figure.figsize"][0], height)
    return figure, figure.subplots()


def _legend(axes: Any) -> None:
    """Above the data, so that it hides none; nothing where nothing was drawn."""
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.figure.legend(loc="outside upper left", ncols=min(len(handles), 4), frameon=False,
                           fontsize=9, columnspacing=1.2, handlelength=1.4)  # fmt: skip


def _svg(figure: Figure, label: str) -> str:
    """The ``<svg>`` element alone, without ids that another figure of the page has too."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
