"""Sections of a report: each has a figure, a table or plain sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_paced.report import figures
from nemo_paced.report.drawing import Line
from nemo_paced.report.run_files import Rows


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with what is under it; ``missing`` says why there is nothing to show.

    Attributes:
        table: rows of cells, the first of them the heading.
        points: further sentences, one a line.
        text: shown as it is, folded away.
        wide: takes the page's whole width instead of one column.
    """

    title: str
    svg: str = ""
    note: str = ""
    missing: str = ""
    text: str = ""
    points: Sequence[str] = ()
    table: list[list[str]] | None = None
    wide: bool = False


def stage_lines(rows: Rows, key: str, error_key: str | None = None) -> list[Line]:
    """The curves of a metric, one a stage, at the steps that logged it."""
    lines = (
        metric_line(stage, own, key, error_key, colour=index)
        for index, (stage, own) in enumerate(rows_by_stage(rows).items())
    )
    return [line for line in lines if line is not None]


def rows_by_stage(rows: Rows) -> dict[str, Rows]:
    """Lines of the metrics by the name of their stage, in its order."""
    stages: dict[str, Rows] = {}
    for row in rows:
        stages.setdefault(str(row["stage"]), []).append(row)
    return stages


def values_of(rows: Rows, key: str) -> list[float]:
    """A metric's values at the steps that logged it (null stands for NaN in the file)."""
    return [row[key] for row in rows if row.get(key) is not None]


def metric_line(
    label: str, rows: Rows, key: str, error_key: str | None = None, *, colour: int = 0
) -> Line | None:
    """The curve of a metric at the steps that logged it; ``None`` where none did."""
    rows = [row for row in rows if row.get(key) is not None]
    if not rows:
        return None
    errors = [row.get(error_key) or 0.0 for row in rows] if error_key else None
    return Line(label, [row["step"] for row in rows], [row[key] for row in rows], errors, colour)


def curve_section(
    title: str,
    lines: Sequence[Line | None],
    ylabel: str,
    *,
    log: bool = False,
    share: bool = False,
    noisy: bool = True,
    note: str = "",
) -> Section:
    """A section of curves (see :func:`figures.curves`), or what is missing."""
    there = [line for line in lines if line is not None]
    if not there:
        return Section(title, missing="No step logged a value.")
    svg = figures.curves(there, ylabel, log=log, share=share, noisy=noisy)
    return Section(title, svg=svg, note=note)
