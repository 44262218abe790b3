"""The commands ``evaluate``, which asks models, and ``grade``, which takes what they answered."""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from nemo_paced.compose import Parser, recipe_arguments, with_config
from nemo_paced.config import PacedConfig
from nemo_paced.data.problems import load_problems
from nemo_paced.errors import ConfigError
from nemo_paced.evaluation.limits import Limits
from nemo_paced.evaluation.lm_eval_tasks import load_suites
from nemo_paced.evaluation.results import (
    Results,
    ResultsFile,
    Source,
    check_alike,
    evaluation_versions,
)
from nemo_paced.evaluation.run import Job, longest_prompt
from nemo_paced.evaluation.tables import show
from nemo_paced.records import Problem
from nemo_paced.run.config_file import CONFIG_FILE, run_of
from nemo_paced.run.progress import progress_bar

logger = logging.getLogger(__name__)

Problems = dict[str, list[Problem]]


def main(arguments: list[str]) -> None:
    """The command ``evaluate``: accuracy of a model, and of a baseline beside it."""
    parser = Parser("evaluate")
    parser.add_argument("model", type=Path)
    parser.add_argument("--problems", action="append", default=[], metavar="[NAME=]FILE")
    parser.add_argument("--lm-eval", metavar="TASK,...")
    parser.add_argument("--lm-eval-tasks", type=Path, metavar="DIR")
    parser.add_argument("--lm-eval-args", metavar="KEY=VALUE,...")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--baseline", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--config-name")
    parser.add_argument("--config-path")
    known, overrides = parser.parse_known_args(arguments)
    if not known.model.is_dir():
        raise ConfigError(_no_model(known.model))
    if known.baseline is not None and not known.baseline.exists():
        raise ConfigError(f"{_no_model(known.baseline)}, or the results.json of an evaluation")
    named = known.config_name or known.config_path
    run_dir = None if named else run_of(known.model.absolute())
    if run_dir is not None:
        Console(stderr=True).print(f"configuration of the run: {run_dir / CONFIG_FILE}")
    recipe = recipe_arguments(known, run_dir, without=["rollout.endpoints"])
    with_config(
        [*recipe, *_short_overrides(known), *overrides],
        lambda config: _evaluate(config, known, load_named(known.problems, config)),
    )


def grade(arguments: list[str]) -> None:
    """The command ``grade``: verdicts on the responses of a file, without any model."""
    from nemo_paced.evaluation.graded_file import grade_file

    parser = Parser("grade")
    parser.add_argument("file")
    parser.add_argument("--response", metavar="COLUMN")
    parser.add_argument("--show", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--config-name")
    parser.add_argument("--config-path")
    known, overrides = parser.parse_known_args(arguments)
    asked = {"response": known.response, "shown": known.show, "out": known.out}
    with_config(
        [*recipe_arguments(known, None), *overrides],
        lambda config: grade_file(known.file, config, **asked, console=Console()),
    )


def load_named(named: Sequence[str], config: PacedConfig) -> Problems:
    """Problems by suite, which is named by ``NAME=FILE``, else after its file.

    Raises:
        ConfigError: two of one name, or a file that is no problem file.
    """
    problems: Problems = {}
    for text in named:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = Path(text).stem, text
        if name in problems:
            raise ConfigError(f"--problems: two files are named {name!r}; say NAME=FILE")
        problems[name] = load_problems(path, key="--problems", data=config.data)
    return problems


def own_problems(config: PacedConfig) -> Problems:
    """The held-out and forgetting problems that the configuration names, by suite.

    Raises:
        ConfigError: it names none.
    """
    files = {
        "heldout": config.data.validation_problems,
        "forgetting": config.data.forgetting_problems,
    }
    problems = load_named([f"{name}={path}" for name, path in files.items() if path], config)
    if not problems:
        raise ConfigError(
            "neither --problems nor --lm-eval is given and the configuration has neither "
            "data.validation_problems nor data.forgetting_problems: give a file or a task"
        )
    return problems


def _no_model(path: Path) -> str:
    return (
        f"{str(path)!r} is no directory: give a Hugging Face directory, a checkpoint or a run "
        "directory"
    )


def _short_overrides(arguments: argparse.Namespace) -> list[str]:
    """The overrides that the command's short flags stand for."""
    block, given = "evaluation.lm_eval", []
    if arguments.samples is not None:
        given.append(f"evaluation.samples={arguments.samples}")
    if arguments.lm_eval:
        given.append(f"{block}.tasks=[{arguments.lm_eval}]")
    if arguments.lm_eval_tasks:
        given.append(f"{block}.include_path='{arguments.lm_eval_tasks.absolute()}'")
    if arguments.lm_eval_args:
        given += [f"{block}.{pair}" for pair in arguments.lm_eval_args.split(",")]
    return given


def _evaluate(config: PacedConfig, arguments: argparse.Namespace, problems: Problems) -> None:
    tasks = load_suites(config.evaluation.lm_eval)
    if not problems and not tasks:
        problems = own_problems(config)
    if twice := problems.keys() & tasks.keys():
        raise ConfigError(f"{min(twice)!r} is the name of a problem file and of a task: rename it")
    given = _given_models(config, arguments)
    with progress_bar() as bar, tempfile.TemporaryDirectory(prefix="nemo-paced-") as scratch:
        models = {label: _as_hf(path, Path(scratch) / label) for label, path in given.items()}
        longest = longest_prompt(config, models, problems)
        limits = Limits.of(config, models, longest_prompt=longest, lm_eval=bool(tasks))
        job = Job(config, problems, tasks, limits)
        earlier = _earlier(arguments.baseline, job)
        sources = {label: Source.of(given[label], folder) for label, folder in models.items()}
        out = arguments.out or _default_out(config, sources["model"])
        work = out.parent / "evaluation"
        results: Results = dict(earlier.models)
        for label, folder in models.items():
            results[label] = job.ask(
                folder, work / sources[label].fingerprint, label=label, bar=bar
            )
    sources = earlier.sources | sources
    ResultsFile(results, job.settings, job.asked, sources, evaluation_versions()).write(out)
    show(Console(), results, job.settings)
    Console(stderr=True).print(f"written: {out}", soft_wrap=True)


def _given_models(config: PacedConfig, arguments: argparse.Namespace) -> dict[str, Path]:
    """Paths of the models to be asked, by label: the baseline first, unless it is a results file.

    Raises:
        ConfigError: there are two models, and servers that run already.
    """
    paths = {"baseline": arguments.baseline, "model": arguments.model}
    given = {label: path for label, path in paths.items() if path is not None and path.is_dir()}
    if config.rollout.endpoints and len(given) > 1:
        raise ConfigError(
            "rollout.endpoints is set and --baseline is a model: running servers hold one model; "
            "evaluate each at its own, then give the baseline's results.json as --baseline"
        )
    return given


def _as_hf(path: Path, scratch: Path) -> Path:
    """A model's Hugging Face directory: ``path``, or ``scratch`` after exporting a checkpoint."""
    if (path / "config.json").exists():
        return path
    from nemo_paced.run.convert import export_hf

    export_hf(PacedConfig(), path, scratch)
    return scratch


def _earlier(baseline: Path | None, job: Job) -> ResultsFile:
    """The baseline's part of a results file, where ``--baseline`` is one; else an empty one.

    Raises:
        ConfigError: it was asked otherwise, or lacks a suite.
    """
    if baseline is None or baseline.is_dir():
        return ResultsFile({}, {})
    file = ResultsFile.read(baseline)
    label = "model" if "model" in file.models else next(iter(file.models))
    suites = [*job.problems, *job.tasks]
    if missing := [suite for suite in suites if suite not in file.models[label]]:
        raise ConfigError(f"--baseline {baseline} has no suite {missing[0]!r}: evaluate it on that")
    asked = {suite: file.asked.get(suite, "") for suite in suites}  # without a digest: refused
    now = ResultsFile({}, job.settings, job.asked)
    check_alike(replace(file, asked=asked), now, names=(f"--baseline {baseline}", "now"))
    kept = {suite: file.models[label][suite] for suite in suites}
    sources = {"baseline": file.sources[label]} if label in file.sources else {}
    return ResultsFile({"baseline": kept}, {}, {}, sources)


def _default_out(config: PacedConfig, source: Source) -> Path:
    name = f"{Path(source.path).absolute().name}-{source.fingerprint[:8]}"
    return Path(config.exp_manager.exp_dir) / "evaluation" / name / "results.json"
