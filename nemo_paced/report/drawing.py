"""What every figure of a report shares: colours, style, legend, and inline SVG.

Text and axes take the page's colour (``currentColor``), so that a figure is readable on a light and
on a dark page; the data colours are chosen for both.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

BLUE, ORANGE, GREEN, GREY, PINK = "#3b82c4", "#e07b26", "#3d9a5b", "#8a8f98", "#c0609f"
PURPLE, SAND, TEAL = "#7d68c8", "#b8a04a", "#2f9da3"
COLOURS = (BLUE, ORANGE, GREEN, PINK, PURPLE, SAND, TEAL, GREY)
# No figure draws in this colour: it stands for the page's own and is replaced in the SVG.
INK = "#010203"
WIDTH = 4.8  # inches; in points about a phone's width: text keeps its size there
STYLE: dict[Any, Any] = {
    "figure.figsize": (WIDTH, 3.0),
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.labelsize": 11,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.7,
    "grid.color": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.parse_math": False,  # names of runs and models are shown as they are
    "svg.fonttype": "none",
    "svg.hashsalt": "nemo_paced",  # the same figure gives the same bytes
}
_LONGEST_NAME = 25  # characters
_LEGEND_COLUMNS, _LEGEND_CHARACTERS = 4, 58  # of one line of the legend, at most
_LEGEND_LINE = 0.2  # height of a line, inches


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: values at optimizer steps, with standard errors where there are any.

    Attributes:
        colour: index into ``COLOURS``: a stage or a run keeps its colour in every figure.
    """

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    errors: Sequence[float] | None = None
    colour: int = 0

    @property
    def name(self) -> str:
        return shown_name(self.label)

    @property
    def hue(self) -> str:
        return COLOURS[self.colour % len(COLOURS)]


def shown_name(label: str) -> str:
    """A name as figures show it: a long one without its middle.

    A name that begins with _ gets a character of no width before it: matplotlib would leave it out.
    """
    if len(label) > _LONGEST_NAME:
        half = (_LONGEST_NAME - 3) // 2
        label = f"{label[:half]}...{label[-half:]}"
    return f"\u200b{label}" if label.startswith("_") else label


def style() -> Any:
    """A context in which figures are drawn and saved."""
    return matplotlib.rc_context(STYLE)


def axes_of(height: float | None = None) -> tuple[Figure, Any]:
    """A figure, ``height`` inches high, with its one pair of axes."""
    figure = Figure()
    if height is not None:
        figure.set_size_inches(WIDTH, height)
    return figure, figure.subplots()


def log_axis(axes: Any) -> None:
    """Make the y axis logarithmic, with its numbers written out: 20, 30, 50, not 2 x 10^1.

    Values within a factor of 2.5 stay on a linear axis, which has more numbers to read them from.
    """
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 2.5 * low:
        axes.set_yscale("linear")
        return
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    few = high < 30 * low  # few powers of ten to read a value from
    axes.yaxis.set_minor_formatter(FuncFormatter(_some_minors) if few else NullFormatter())


def _some_minors(value: float, _: int) -> str:
    mantissa = round(value / 10 ** math.floor(math.log10(value)))
    return f"{value:g}" if mantissa in (2, 3, 5) else ""


def legend(axes: Any) -> None:
    """Put a legend above the data, where it hides none; nothing where nothing was drawn."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        longest = max(map(len, labels)) + 5  # a key and the gap
        columns = max(1, min(len(handles), _LEGEND_COLUMNS, _LEGEND_CHARACTERS // longest))
        width, height = axes.figure.get_size_inches()
        further = math.ceil(len(handles) / columns) - 1
        axes.figure.set_size_inches(width, height + further * _LEGEND_LINE)  # not off the plot
        axes.figure.legend(loc="outside upper left", ncols=columns, frameon=False,
                           fontsize=10, columnspacing=1.2, handlelength=1.2)  # fmt: skip


def to_svg(figure: Figure, label: str) -> str:
    """A figure as one ``<svg>`` element, without the ids that nothing in it refers to.

    Another figure of the page would have those too.

    Args:
        label: what the figure shows, for screen readers.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)
