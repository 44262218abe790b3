"""Figures of a run as inline SVG: plain matplotlib, one idea each, axes with units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nemo_paced.report.drawing import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    INK,
    ORANGE,
    Line,
    axes_of,
    legend,
    log_axis,
    shown_name,
    style,
    to_svg,
)
from nemo_paced.weights.summary import in_bins

SMOOTHED_OVER = 10  # steps of the trailing mean
FEW_POINTS = 20  # a line of up to so many points has markers and is not smoothed
MOST_BARS = 8  # stacked, side by side; more steps are drawn as areas


def pass_rate_histogram(tables: dict[str, Sequence[float]], num_rollouts: int) -> str:
    """Histogram of the problems' pass rates, for each estimate, as inline SVG.

    With K rollouts a pass rate is one of 0/K .. K/K: up to K = 16 each has its own bar (ten equal
    bins would leave gaps and pile two values up in others), above that there are ten bins.

    Args:
        tables: label of an estimate -> pass rates of all problems.
        num_rollouts: K.
    """
    centres, edges = _bins(num_rollouts)
    with style():
        figure, axes = axes_of()
        width = 0.8 * (edges[1] - edges[0]) / len(tables)
        for index, (label, rates) in enumerate(tables.items()):
            counts = in_bins(rates, edges)
            shift = (index - (len(tables) - 1) / 2) * width
            colour = (GREY, BLUE)[index] if len(tables) == 2 else BLUE
            axes.bar(centres + shift, counts, width, label=label, color=colour)
        axes.set(xlabel="pass rate of a problem", ylabel="problems", xticks=np.linspace(0, 1, 6))
        legend(axes)
        return to_svg(figure, "Histogram of pass rates")


def weights_by_pass_rate(
    pass_rates: Sequence[float], weights: Sequence[float], num_rollouts: int
) -> str:
    """Figure of a problem's weight by pass rate (line), and of the share of all weight (bars)."""
    values = np.asarray(weights)
    centres, edges = _bins(num_rollouts)
    held, counts = in_bins(pass_rates, edges, values), in_bins(pass_rates, edges)
    there = counts > 0
    with style():
        figure, axes = axes_of()
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
        return to_svg(figure, "Weights against pass rate")


def curves(
    lines: Sequence[Line],
    ylabel: str,
    *,
    log: bool = False,
    share: bool = False,
    noisy: bool = True,
) -> str:
    """Figure of one metric against the optimizer step, as inline SVG.

    Args:
        log: the axis is logarithmic; values that are not above 0 are left out.
        share: the axis goes from 0 to 1.
        noisy: long curves are drawn faint, under their trailing mean.
    """
    with style():
        figure, axes = axes_of()
        for line in lines:
            _draw_line(axes, line, log=log, noisy=noisy, band=len(lines) > 1)
        if log:
            log_axis(axes)
        if share:
            axes.set_ylim(-0.02, 1.02)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="optimizer step", ylabel=ylabel)
        legend(axes)
        return to_svg(figure, f"{ylabel} against optimizer step")


def _draw_line(axes: Any, line: Line, *, log: bool, noisy: bool, band: bool) -> None:
    steps, values = np.asarray(line.steps), np.asarray(line.values, dtype=float)
    if log:
        steps, values = steps[values > 0], values[values > 0]
    if line.errors is not None and band:  # error bars of several lines would hide each other
        errors = np.asarray(line.errors, dtype=float)
        axes.fill_between(steps, values - errors, values + errors, color=line.hue, alpha=0.18, lw=0)
        axes.plot(steps, values, "o-", color=line.hue, label=line.name)
    elif line.errors is not None:
        axes.errorbar(
            steps, values, line.errors, fmt="o-", capsize=3, color=line.hue, label=line.name
        )
    elif len(steps) <= FEW_POINTS:
        axes.plot(steps, values, ".-", color=line.hue, lw=1.4, label=line.name)
    elif not noisy:
        axes.plot(steps, values, color=line.hue, lw=1.8, label=line.name)
    else:
        axes.plot(steps, values, color=line.hue, lw=0.8, alpha=0.4)
        axes.plot(steps, _trailing_mean(values), color=line.hue, lw=1.8, label=line.name)


def drift(steps: Sequence[int], shares: Sequence[Sequence[float]], means: Sequence[float]) -> str:
    """Figure of how the training problems move between hard, useful and mastered.

    Args:
        shares: at each step, shares of problems with a pass rate below 0.2, between, above 0.8.
        means: mean pass rate at each step.
    """
    names, colours = ("below 0.2", "0.2 to 0.8", "above 0.8"), (ORANGE, BLUE, GREEN)
    columns = list(zip(*shares, strict=True))
    with style():
        figure, axes = axes_of()
        if len(steps) > MOST_BARS:
            axes.stackplot(steps, columns, colors=colours, labels=names)
            axes.plot(steps, means, color=INK, lw=1.8, label="mean pass rate")
            axes.margins(x=0)
        else:
            at, below = np.arange(len(steps)), np.zeros(len(steps))
            for name, colour, column in zip(names, colours, columns, strict=True):
                axes.bar(at, column, 0.6, bottom=below, color=colour, label=name)
                below += column
            axes.plot(at, means, "o-", color=INK, label="mean pass rate")
            axes.set(xticks=at, xticklabels=[str(step) for step in steps])
        axes.set(xlabel="optimizer step", ylabel="share of problems; mean", ylim=(0, 1))
        axes.grid(visible=False)
        legend(axes)
        return to_svg(figure, "Drift of pass rates")


def timing(seconds: dict[str, dict[str, float]]) -> str:
    """Figure of where the wall time of each stage, or run, went.

    Args:
        seconds: label -> part -> seconds; the last part is drawn grey.
    """
    labels = [shown_name(label) for label in seconds]
    parts = list(next(iter(seconds.values())))
    with style():
        figure, axes = axes_of(height=1.7 + 0.5 * len(labels))
        left = np.zeros(len(labels))
        for index, part in enumerate(parts):
            widths = np.array([each[part] for each in seconds.values()])
            colour = GREY if index == len(parts) - 1 else COLOURS[index]
            axes.barh(range(len(labels)), widths, 0.6, left=left, color=colour, label=part)
            left += widths
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set(yticks=range(len(labels)), yticklabels=labels, xlabel="wall time of the steps (s)")
        legend(axes)
        return to_svg(figure, "Wall time by part")


def weight_errors(lines: Sequence[Line], goal: float) -> str:
    """Figure of the weights' RMS error against rollouts a problem (lines' steps), and a goal."""
    with style():
        figure, axes = axes_of()
        for line in lines:
            axes.errorbar(
                line.steps, line.values, line.errors, fmt=".-", color=line.hue, label=line.name
            )
        axes.axhline(goal, color=GREY, lw=0.8, ls="--")
        axes.set(xlabel="rollouts a problem, mean", ylabel="RMS error of a weight", ylim=(0, None))
        legend(axes)
        return to_svg(figure, "RMS error of the weights against rollouts a problem")


def _bins(num_rollouts: int) -> tuple[Any, Any]:
    """Centres and edges of the bars over pass rates."""
    if num_rollouts <= 16:
        centres = np.linspace(0, 1, num_rollouts + 1)
        half = 0.5 / num_rollouts
        return centres, np.append(centres - half, 1 + half)
    edges = np.linspace(0, 1, 11)
    return (edges[1:] + edges[:-1]) / 2, edges


def _trailing_mean(values: Any) -> Any:
    return [values[max(0, end - SMOOTHED_OVER) : end].mean() for end in range(1, len(values) + 1)]
