"""The figure of gradient SNR by pass rate, beside the theory's curve, and of gradient norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from nemo_paced.report.drawing import BLUE, GREY, INK, ORANGE, PINK, WIDTH, style, to_svg
from nemo_paced.snr.record import SnrRecord
from nemo_paced.snr.summary import Summary, SummaryRow
from nemo_paced.weights.beta_kernel import beta_weight


def snr_svg(record: SnrRecord, summary: Summary) -> str:
    """The SNR figure as inline SVG, for a report."""
    with style():
        return to_svg(_draw(record, summary), "Gradient signal-to-noise ratio against pass rate")


def write_png(record: SnrRecord, summary: Summary, path: Path) -> None:
    """Write the SNR figure as a PNG on white."""
    with style():
        _draw(record, summary).savefig(path, dpi=150, facecolor="white")


def _draw(record: SnrRecord, summary: Summary) -> Figure:
    rows = [row for row in summary.rows if row.found is not None]
    figure = Figure(figsize=(WIDTH, 5.0))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _draw_snr(above, rows, record, summary)
    _draw_norms(below, rows)
    below.set(xlabel="pass rate of a problem", xlim=(0, 1), xticks=np.linspace(0, 1, 6))
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=10)
    return figure


def _draw_snr(axes: Any, rows: list[SummaryRow], record: SnrRecord, summary: Summary) -> None:
    middle = np.array([(row.bin.low + row.bin.high) / 2 for row in rows])
    width = 0.8 * np.array([row.bin.high - row.bin.low for row in rows])
    found = [row.found for row in rows if row.found is not None]
    snr = np.array([one.snr for one in found])
    largest = snr.max(initial=0.0) or 1.0
    low, high = (
        np.sqrt(np.maximum([getattr(one.snr_squared, side) for one in found], 0))
        for side in ("low", "high")
    )
    axes.bar(middle, snr / largest, width, color=BLUE, label="SNR, unbiased, 95 %")
    axes.errorbar(
        middle, snr / largest, [(snr - low) / largest, (high - snr) / largest], fmt="none",
        ecolor=INK, capsize=2.5, lw=1,
    )  # fmt: skip
    plain = np.array([one.plain.value for one in found])
    axes.plot(middle, plain / plain.max(initial=1e-300), "_", ms=14, mew=2, color=GREY,
              label="SNR, plain")  # fmt: skip
    grid = np.linspace(0.001, 0.999, 400)
    theory = np.sqrt(beta_weight(grid, record.alpha, record.beta))
    kernel = f"theory: root of p^{record.alpha:g} (1-p)^{record.beta:g}"
    axes.plot(grid, theory / theory.max(), color=ORANGE, lw=1.8, label=kernel)
    if summary.snr_law is not None:
        fitted = np.sqrt(summary.snr_law.at(grid)) / largest
        axes.plot(grid, fitted, "--", color=PINK, lw=1.4, label="fitted exponents")
    top = max(1.15, *(high / largest).tolist()) if len(rows) else 1.15
    axes.set(ylabel="SNR / largest", ylim=(0, min(1.05 * top, 2.5)))


def _draw_norms(axes: Any, rows: list[SummaryRow]) -> None:
    middle = [(row.bin.low + row.bin.high) / 2 for row in rows]
    norms = [row.found.gradient_norm for row in rows if row.found is not None]
    axes.errorbar(
        middle, [n.value for n in norms], [2 * n.standard_error for n in norms], fmt="o-",
        color=BLUE, capsize=3,
    )  # fmt: skip
    axes.set(ylabel="mean ||g||", ylim=(0, None))
