"""Findings of a preflight, and how they are shown: all at once, each with its remedy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nemo_paced.errors import PacedError


class Severity(Enum):
    error = "error"  # the run cannot work: it is not started
    warning = "warning"  # the run can work, but hardly as intended
    note = "note"  # worth knowing; shown by `preflight` alone


_COLOURS = {Severity.error: "red", Severity.warning: "yellow", Severity.note: "dim"}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that a check found.

    Attributes:
        where: what it concerns: a setting by its dotted key, a rank, a library.
        what: what was found, with the values.
        remedy: what to do; may be empty.
    """

    severity: Severity
    where: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.severity.value}: {self.where}: {self.what}{remedy}"


class PreflightFailed(PacedError):
    """The preflight found an error, or this rank could not take part in it.

    The message is empty on ranks that do not show findings.
    """


def error(where: str, what: str, remedy: str = "") -> Finding:
    return Finding(Severity.error, where, what, remedy)


def warning(where: str, what: str, remedy: str = "") -> Finding:
    return Finding(Severity.warning, where, what, remedy)


def note(where: str, what: str) -> Finding:
    return Finding(Severity.note, where, what)


def errors_of(findings: Iterable[Finding]) -> list[Finding]:
    return [f for f in findings if f.severity is Severity.error]


def refuse(findings: Sequence[Finding], *, notes: bool = False, shown: bool = True) -> None:
    """Show the findings on standard error and stop if one is an error.

    Args:
        notes: show findings of severity ``note`` too.
        shown: false on all ranks but the first: they stop without a word.

    Raises:
        PreflightFailed: there is an error among them.
    """
    if shown:
        show([f for f in findings if notes or f.severity is not Severity.note])
    if count := len(errors_of(findings)):
        text = f"{count} error{'s' if count > 1 else ''} found before the start, listed above"
        raise PreflightFailed(text if shown else "")


def show(findings: Sequence[Finding], console: Console | None = None) -> None:
    """Print findings, errors first: a table on a terminal, elsewhere one line each, for grep."""
    console = console or Console(stderr=True)
    ordered = sorted(findings, key=lambda f: list(Severity).index(f.severity))
    if not ordered:
        return
    if not console.is_terminal:
        for finding in ordered:
            console.print(str(finding), markup=False, highlight=False, soft_wrap=True)
        return
    table = Table("", "where", "what", "remedy", show_lines=True)
    for finding in ordered:
        colour = _COLOURS[finding.severity]
        table.add_row(
            f"[{colour}]{finding.severity.value}[/{colour}]",
            *map(escape, (finding.where, finding.what, finding.remedy)),
        )
    console.print(table)
