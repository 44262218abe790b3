"""The page of several runs: the quickstart's arms, or any runs by ``report --compare``."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from nemo_paced.errors import ConfigError
from nemo_paced.evaluation.results import Results
from nemo_paced.report.evaluated_runs import Baselines, EvaluatedRuns
from nemo_paced.report.page import Part, write_page
from nemo_paced.report.run_files import RunFiles
from nemo_paced.report.sections.accuracy import accuracy_sections, paired_section, verdict
from nemo_paced.report.sections.comparison import side_by_side
from nemo_paced.report.sections.run import run_sections


def write_comparison(
    path: Path,
    title: str,
    runs: dict[str, Path],
    results: Results,
    *,
    subject: str,
    settings: dict[str, Any],
    baselines: Baselines | None = None,
) -> list[str]:
    """Write a page about several runs; return what the numbers allow to be said of ``subject``.

    Args:
        runs: label -> run directory; a label is also that of its model in ``results``.
        results: accuracies by model, the reference first; may lack some runs' models.
        subject: label of the model that the sentences are about.
        settings: how the accuracies were sampled.
        baselines: label of a model -> of the one that it is compared with; ``None``: the first for
            all others.
    """
    read = {label: RunFiles.read(directory) for label, directory in runs.items()}
    said = (
        verdict(results, subject, baselines) if results else ["None of these runs was evaluated."]
    )
    lead = [*said, _equal_steps(read)]
    if absent := [label for label in runs if results and label not in results]:
        lead.append(f"Not evaluated: {', '.join(absent)}.")
    accuracy = accuracy_sections(results, settings, baselines) if results else []
    pairs = paired_section(results, [label for label in runs if label in results], subject)
    parts = [Part([*accuracy, *pairs, *side_by_side(read)])]
    parts += [Part(run_sections(run), title=label) for label, run in read.items()]
    write_page(path, title, lead, parts)
    return said


def compare_runs(named: Sequence[str], out: Path | None = None) -> Path:
    """Write the page of ``report --compare`` and return its path.

    It lies in the runs' common folder unless ``out`` says where.

    Args:
        named: run directories, each as ``RUN`` or ``LABEL=RUN``.

    Raises:
        ConfigError: a run or a label is there twice, a label is ``base``, a run cannot be read, or
            runs were evaluated on different problems or otherwise than alike.
    """
    runs = labelled(named)
    found = EvaluatedRuns()
    for label, directory in runs.items():
        found.add(label, RunFiles.read(directory))
    folder = Path(os.path.commonpath([directory.parent for directory in runs.values()]))
    path = out or folder / "comparison.html"
    last = ["", *found.results, *(label for label in runs if label in found.results)][-1]
    write_comparison(
        path,
        "PACED runs side by side",
        runs,
        found.results,
        subject="paced" if "paced" in found.results else last,
        settings=found.settings,
        baselines=found.baselines,
    )
    return path


def labelled(named: Sequence[str]) -> dict[str, Path]:
    """Run directories by label.

    A run without a label has its folder's name; folders of one name have as much of their paths as
    tells them apart.

    Raises:
        ConfigError: a run or a label is there twice.
    """
    given = [_label_and_path(name) for name in named]
    paths = [path for _, path in given]
    if twice := [str(path) for path, count in Counter(paths).items() if count > 1]:
        raise ConfigError(f"--compare: {', '.join(twice)} is there twice")
    unnamed = [path for label, path in given if not label]
    labels = [label or _short_name(path, unnamed) for label, path in given]
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        raise ConfigError(
            f"--compare: two runs are labelled {', '.join(twice)}: LABEL=RUN names one"
        )
    return dict(zip(labels, paths, strict=True))


def terminal_table(results: Results) -> Table:
    """Table of mean@k by model and suite, for a terminal."""
    table = Table(title="mean@k ± standard error over problems")
    table.add_column("model")
    for suite in next(iter(results.values())):
        table.add_column(suite, justify="right")
    for label, suites in results.items():
        table.add_row(label, *(f"{a.mean:.3f} ± {a.standard_error:.3f}" for a in suites.values()))
    return table


def _label_and_path(name: str) -> tuple[str, Path]:
    label, sign, path = name.partition("=")
    if not sign or "/" in label or Path(name).exists():  # a path may hold the sign itself
        return "", Path(name).resolve()
    return label, Path(path).resolve()


def _short_name(path: Path, others: Sequence[Path]) -> str:
    for count in range(1, len(path.parts)):
        name = "/".join(path.parts[-count:])
        if sum(other.parts[-count:] == path.parts[-count:] for other in others) == 1:
            return name
    return str(path)


def _equal_steps(runs: dict[str, RunFiles]) -> str:
    steps = {label: run.rows[-1]["step"] if run.rows else 0 for label, run in runs.items()}
    if len(set(steps.values())) == 1:
        return f"All runs took {next(iter(steps.values()))} optimizer steps."
    listed = ", ".join(f"{label} {count}" for label, count in steps.items())
    return f"The runs took different numbers of optimizer steps: {listed}."
