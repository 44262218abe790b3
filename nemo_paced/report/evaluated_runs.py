"""Accuracies of several runs, each run beside the model that it started from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from nemo_paced.errors import ConfigError
from nemo_paced.evaluation.results import (
    BASE_LABELS,
    Results,
    ResultsFile,
    Source,
    check_alike,
)
from nemo_paced.grading.accuracy import Accuracy
from nemo_paced.report.run_files import RunFiles

BASE = "base"
Baselines: TypeAlias = dict[str, str]  # label of a model -> label of its baseline


@dataclass(slots=True)
class EvaluatedRuns:
    """Accuracies of several runs and of their baselines, each model once.

    Attributes:
        results: accuracies by label. The first baseline is ``base``; another one is
            ``base of LABEL``, after the first run that started from it.
        own: label of each run whose baseline was evaluated -> that baseline's label.
    """

    results: Results = field(default_factory=dict)
    own: Baselines = field(default_factory=dict)
    _files: dict[str, ResultsFile] = field(default_factory=dict)
    _sources: dict[str, Source] = field(default_factory=dict)

    def add(self, label: str, run: RunFiles) -> None:
        """Add a run's trained model under the run's label, and its baseline, each model once.

        Raises:
            ConfigError: the label is ``base``, or earlier runs were not evaluated alike.
        """
        if label == BASE:
            raise ConfigError(
                f"--compare: {run.directory} is labelled {BASE}, which is the name of the model "
                "that runs started from: give another, LABEL=RUN"
            )
        file = run.evaluated
        for other, earlier in self._files.items():
            check_alike(file, earlier, names=(f"{run.directory}/results.json", other))
        self._files[label] = file
        base = next((name for name in file.models if name in BASE_LABELS), None)
        if base is not None:
            self.own[label] = self._add_base(label, file.models[base], file.sources.get(base))
        trained = [name for name in file.models if name not in BASE_LABELS]
        if trained:
            named = [n for n in (label, run.directory.resolve().name) if n in trained]
            self.results[label] = file.models[named[0] if named else trained[-1]]

    @property
    def baselines(self) -> Baselines:
        """The baseline of each trained model: its own, else the only one that the others have."""
        bases = set(self.own.values())
        shared = dict.fromkeys(self.results, min(bases)) if len(bases) == 1 else {}
        known = shared | self.own
        return {m: known[m] for m in self.results if m in known and m not in bases}

    @property
    def settings(self) -> dict[str, Any]:
        """The sampling settings of all runs; values that differ are given as ``1 or 2``."""
        found: dict[str, list[Any]] = {}
        for file in self._files.values():
            for name, value in file.settings.items():
                values = found.setdefault(name, [])
                values += [value] if value not in values else []
        return {
            name: values[0] if len(values) == 1 else " or ".join(map(str, values))
            for name, values in found.items()
        }

    def _add_base(self, label: str, suites: dict[str, Accuracy], source: Source | None) -> str:
        """Add a baseline, unless the same model is there already, and return its label."""
        for known in dict.fromkeys(self.own.values()):
            if _same_model(self.results[known], self._sources.get(known), suites, source):
                self.results[known] = suites | self.results[known]
                return known
        name = f"{BASE} of {label}" if self.own else BASE
        new = {name: suites}
        self.results = self.results | new if self.own else new | self.results  # base comes first
        if source is not None:
            self._sources[name] = source
        return name


def _same_model(
    one: dict[str, Accuracy], source: Source | None, other: dict[str, Accuracy], its: Source | None
) -> bool:
    """Whether two models are one: by fingerprint, or by accuracies where one has none."""
    if source is not None and its is not None:
        return source.fingerprint == its.fingerprint
    common = one.keys() & other.keys()
    return bool(common) and all(one[s].per_problem == other[s].per_problem for s in common)
