"""Several runs side by side: the quickstart's arms, or any runs by ``report --compare``."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from nemo_paced.analysis.accuracy_sections import accuracy_sections, verdict
from nemo_paced.analysis.page import Part, write_page
from nemo_paced.analysis.run_files import RunFiles
from nemo_paced.analysis.sections import (
    Section,
    curve_section,
    metric_line,
    run_sections,
    share_clipped,
)
from nemo_paced.errors import ConfigError
from nemo_paced.evaluation.results import BASE_LABELS, Results, different_settings
from nemo_paced.rollout.accuracy import Accuracy


def write_comparison(
    path: Path,
    title: str,
    runs: dict[str, Path],
    results: Results,
    *,
    subject: str,
    settings: dict[str, Any],
) -> list[str]:
    """Write the page; returns the sentences that the numbers allow on ``subject``.

    Args:
        runs: label -> run directory; a label is also that of its model in ``results``.
        results: accuracies by model, the reference first; may lack some runs' models.
        settings: how these were sampled.
    """
    read = {label: RunFiles.read(directory) for label, directory in runs.items()}
    said = verdict(results, subject) if results else ["None of these runs was evaluated."]
    lead = [*said, _equal_steps(read)]
    if absent := [label for label in runs if results and label not in results]:
        lead.append(f"Not evaluated: {', '.join(absent)}.")
    accuracy = accuracy_sections(results, settings) if results else []
    parts = [Part([*accuracy, *_side_by_side(read)])]
    parts += [Part(run_sections(run), title=label) for label, run in read.items()]
    write_page(path, title, lead, parts)
    return said


def compare_runs(directories: Sequence[Path], out: Path | None = None) -> Path:
    """``report --compare``; the page lies in the runs' common folder unless ``out`` says where.

    Raises:
        ConfigError: runs of one name, or evaluated on different problems.
    """
    directories = [directory.resolve() for directory in directories]
    runs = {directory.name: directory for directory in directories}
    if len(runs) < len(directories):
        raise ConfigError("--compare: the runs are told apart by folder name, and two are alike")
    results: Results = {}
    settings: dict[str, Any] = {}
    for label, directory in runs.items():
        run = RunFiles.read(directory)
        _add_results(results, label, run.results)
        if settings and run.settings and different_settings(settings, run.settings):
            raise ConfigError(
                f"{directory}/results.json was evaluated with {run.settings}, an earlier run with "
                f"{settings}: evaluate them alike to compare them"
            )
        settings = settings or run.settings
    folder = Path(os.path.commonpath([directory.parent for directory in directories]))
    path = out or folder / "comparison.html"
    subject = "paced" if "paced" in results else next(reversed(results or {"": {}}))
    write_comparison(
        path, "PACED runs side by side", runs, results, subject=subject, settings=settings
    )
    return path


def terminal_table(results: Results) -> Table:
    """mean@k by model and suite."""
    table = Table(title="mean@k ± standard error over problems")
    table.add_column("model")
    for suite in next(iter(results.values())):
        table.add_column(suite, justify="right")
    for label, suites in results.items():
        table.add_row(label, *(f"{a.mean:.3f} ± {a.standard_error:.3f}" for a in suites.values()))
    return table


def _add_results(results: Results, label: str, own: Results) -> None:
    """The run's trained model under the run's name, its base once for all runs."""
    trained = [name for name in own if name not in BASE_LABELS]
    bases = [name for name in own if name in BASE_LABELS]
    if bases and "base" not in results:
        first = {"base": own[bases[0]]}
        rest = dict(results)
        results.clear()
        results.update(first | rest)  # the reference comes first
    if trained:
        model: dict[str, Accuracy] = own[label if label in own else trained[-1]]
        results[label] = model


def _equal_steps(runs: dict[str, RunFiles]) -> str:
    steps = {label: run.rows[-1]["step"] if run.rows else 0 for label, run in runs.items()}
    if len(set(steps.values())) == 1:
        return f"All runs took {next(iter(steps.values()))} optimizer steps."
    listed = ", ".join(f"{label} {count}" for label, count in steps.items())
    return f"The runs took different numbers of optimizer steps: {listed}."


def _side_by_side(runs: dict[str, RunFiles]) -> list[Section]:
    table = [["run", "steps", "stages", "problems a batch", "tokens", "clipped", "wall time (s)"]]
    for label, run in runs.items():
        rows = run.rows
        if not rows:
            table.append([label, "0", *[""] * 5])
            continue
        table.append(
            [
                label,
                str(rows[-1]["step"]),
                ", ".join(dict.fromkeys(row["stage"] for row in rows)),
                f"{statistics.fmean(row.get('weights/active_problems') or 0 for row in rows):.1f}",
                f"{sum(row.get('tokens') or 0 for row in rows):,}",
                f"{share_clipped(rows):.0%}",
                f"{sum(row.get('time/step_s') or 0.0 for row in rows):.1f}",
            ]
        )

    def lines(key: str, error_key: str | None = None):
        return [metric_line(label, run.rows, key, error_key) for label, run in runs.items()]

    sections = [
        Section(
            "Runs",
            table=table,
            note="Problems of weight above 0 in a batch, and their tokens: what was trained on.",
            wide=True,
        ),
        curve_section(
            "Divergence of a token",
            lines("token_divergence"),
            "mean of a token (nats)",
            note="Unweighted, but each run trains on other tokens, and a stage change changes the "
            "divergence: levels are comparable within a stage alone.",
        ),
        curve_section("Gradient norm", lines("grad_norm"), "global norm before clipping", log=True),
    ]
    validation = lines("validation/accuracy", "validation/standard_error")
    if any(validation):
        sections.append(curve_section("Validation", validation, "mean@k"))
    return sections
