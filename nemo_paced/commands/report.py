"""The command ``report``: one self-contained HTML page about a run, or about several."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from nemo_paced.compose import Parser
from nemo_paced.errors import ConfigError
from nemo_paced.report.comparison import compare_runs
from nemo_paced.report.run_page import write_report


def main(arguments: list[str]) -> None:
    """The command ``report``: write a page and print its path."""
    parser = Parser("report")
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--compare", nargs="+", metavar="[LABEL=]RUN")
    parser.add_argument("--out", type=Path)
    known = parser.parse_args(arguments)
    if (known.run is None) == (known.compare is None):
        raise ConfigError("give one run directory, or --compare RUN RUN ...")
    if known.compare:
        path = compare_runs(known.compare, known.out)
    else:
        path = write_report(known.run, known.out)
    Console(soft_wrap=True).print(str(path), markup=False, highlight=False)
