"""Files of a run directory, read for a report; a run may be going on or may have been killed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_paced.errors import ConfigError
from nemo_paced.evaluation.results import Results, ResultsFile
from nemo_paced.grading.verdicts import Verdicts
from nemo_paced.run.config_file import METRICS_FILE, leaves
from nemo_paced.run.environment import Start, read_starts
from nemo_paced.teacher.fp8.certificate import Certificate

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What a report reads from a run directory.

    Attributes:
        directory: of the run.
        config: text of ``config.yaml``; empty where there is none.
        rows: lines of ``metrics.jsonl``.
        tables: pass-rate tables (pandas) by the student's optimizer step.
        verdicts: counts of the verdicts behind an estimate, by the student's optimizer step.
        evaluated: ``results.json``; empty where nothing was evaluated.
        certificate: of a teacher in FP8; ``None`` where there is none.
        starts: what the run ran on, one entry a start; empty for a run that never trained.
    """

    directory: Path
    config: str
    rows: Rows
    tables: dict[int, Any]
    verdicts: dict[int, Verdicts]
    evaluated: ResultsFile
    certificate: Certificate | None
    starts: list[Start]

    @property
    def results(self) -> Results:
        """Accuracies by model and suite, from ``results.json``."""
        return self.evaluated.models

    @property
    def settings(self) -> dict[str, Any]:
        """How the accuracies were sampled, from ``results.json``."""
        return self.evaluated.settings

    @staticmethod
    def read(directory: Path) -> RunFiles:
        """Read the files of a run that are there.

        Raises:
            ConfigError: nothing of a run is there, or a file of it cannot be read.
        """
        config, path = directory / "config.yaml", directory / "results.json"
        run = RunFiles(
            directory=directory,
            config=config.read_text() if config.exists() else "",
            rows=read_metrics(directory / METRICS_FILE),
            tables=read_tables(directory),
            verdicts={
                int(path.name[len("step_") :].partition(".")[0]): Verdicts.read(path)
                for path in sorted((directory / "pass_rates").glob("step_*.verdicts.json"))
            },
            evaluated=ResultsFile.read(path) if path.exists() else ResultsFile({}, {}),
            certificate=Certificate.read(directory),
            starts=read_starts(directory),
        )
        if not (run.config or run.rows or run.tables or run.results):
            raise ConfigError(
                f"{directory} is no run directory: it has no config.yaml, metrics.jsonl, "
                "pass_rates.parquet or results.json"
            )
        return run

    def settings_by_key(self) -> dict[str, Any]:
        """The saved configuration as ``section.key`` -> value; lists whole, but for the stages."""
        import yaml

        return leaves(yaml.safe_load(self.config) or {}) if self.config else {}

    def setting(self, key: str) -> Any:
        """A setting of the saved configuration; ``None`` where that does not have it."""
        return self.settings_by_key().get(key)


def read_metrics(path: Path) -> Rows:
    """Lines of ``metrics.jsonl``; a last line cut short by a kill is left out.

    Raises:
        ConfigError: another line is not JSON.
    """
    rows: Rows = []
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: not a line of JSON: {error}") from error
    return rows


def read_tables(directory: Path) -> dict[int, Any]:
    """Pass-rate tables by the student's step: all in ``pass_rates/``, else the latest alone.

    Raises:
        ConfigError: a table cannot be read.
    """
    import pandas

    paths = sorted((directory / "pass_rates").glob("step_*.parquet"))
    paths = paths or [p for p in [directory / "pass_rates.parquet"] if p.exists()]
    tables = {}
    for path in paths:
        try:
            frame = pandas.read_parquet(path)
            tables[int(frame["student_step"].iloc[0])] = frame
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise ConfigError(f"{path} is no pass-rate table that can be read: {error}") from error
    return tables
