"""The command ``report``: one self-contained HTML page about a run, or about several."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from nemo_paced.analysis.accuracy_sections import accuracy_sections, verdict
from nemo_paced.analysis.comparison import compare_runs
from nemo_paced.analysis.page import Part, write_page
from nemo_paced.analysis.run_files import RunFiles
from nemo_paced.analysis.sections import Section, run_sections
from nemo_paced.analysis.snr_section import snr_section
from nemo_paced.errors import ConfigError


def main(arguments: list[str]) -> None:
    """The command ``report``."""
    parser = argparse.ArgumentParser(prog="nemo-paced report", allow_abbrev=False)
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path)
    known = parser.parse_args(arguments)
    if (known.run is None) == (known.compare is None):
        raise ConfigError("give one run directory, or --compare RUN RUN ...")
    if known.compare:
        path = compare_runs(known.compare, known.out)
    else:
        path = write_report(known.run, known.out)
    Console(soft_wrap=True).print(str(path), markup=False, highlight=False)


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write ``report.html`` from what the run directory holds; what is missing is said.

    Raises:
        ConfigError: it is no run directory, or a file of it cannot be read.
    """
    run = RunFiles.read(run_dir)
    if run.results:
        accuracy = accuracy_sections(run.results, run.settings)
    else:
        missing = (
            f"Not evaluated yet: nemo-paced evaluate {run_dir} --problems FILE --baseline HF_DIR "
            f"--out {run_dir / 'results.json'}, then make this report again."
        )
        accuracy = [Section("Accuracy", missing=missing, wide=True)]
    parts = [Part([*accuracy, *run_sections(run), *snr_section(run_dir)])]
    title = f"PACED run {run_dir.resolve().name}"
    return write_page(out or run_dir / "report.html", title, _lead(run), parts)


def _lead(run: RunFiles) -> list[str]:
    if not run.rows:
        return ["No optimizer step was taken yet."]
    steps, planned = run.rows[-1]["step"], run.max_steps
    done = f"{steps} of {planned} optimizer steps" if planned else f"{steps} optimizer steps"
    stages = dict.fromkeys(row["stage"] for row in run.rows)
    counts = (f"{sum(row['stage'] == s for row in run.rows)} of {s}" for s in stages)
    lead = [f"{done}: {', '.join(counts)}."]
    if len(run.results) > 1:
        lead += verdict(run.results, list(run.results)[-1])
    return lead
