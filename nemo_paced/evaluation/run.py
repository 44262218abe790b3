"""Accuracy of a model on problem files: the command ``evaluate``."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from nemo_paced.compose import with_config
from nemo_paced.config import PacedConfig
from nemo_paced.data.problems import load_problems
from nemo_paced.errors import ConfigError
from nemo_paced.evaluation.results import Results, write_results
from nemo_paced.hf.tokenizer import Prompts
from nemo_paced.records import Problem
from nemo_paced.rollout.accuracy import Accuracy, Difference
from nemo_paced.training import prepare
from nemo_paced.training.progress import progress_bar
from nemo_paced.training.sampler import Sampler

Suites = dict[str, list[Problem]]


def evaluate(
    config: PacedConfig,
    sampler: Sampler,
    problems: Sequence[Problem],
    *,
    label: str,
    bar: Progress,
) -> Accuracy:
    """mean@k of the served model, sampled as the ``evaluation`` block says."""
    with prepare.bar_task(bar, f"evaluate {label}", len(problems)) as advance:
        rollouts = sampler.sample(
            problems,
            purpose=f"evaluation {label}",
            step=0,
            settings=prepare.evaluation_settings(config),
            progress=advance,
        )
    return Accuracy.of(rollouts, problems)


def sampling_settings(config: PacedConfig) -> dict[str, Any]:
    """What accuracies depend on besides the model: kept in ``results.json``."""
    settings = prepare.evaluation_settings(config)
    return {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "verifier": config.grading.verifier,
        "seed": config.model.seed,
    }


def main(arguments: list[str]) -> None:
    """The command ``evaluate``."""
    parser = argparse.ArgumentParser(prog="nemo-paced evaluate", allow_abbrev=False)
    parser.add_argument("model", type=Path)
    parser.add_argument("--problems", action="append", default=[], metavar="[NAME=]FILE")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--baseline", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--config-name")
    parser.add_argument("--config-path")
    known, overrides = parser.parse_known_args(arguments)
    for path in (known.model, known.baseline):
        if path is not None and not path.is_dir():
            raise ConfigError(
                f"{str(path)!r} is no directory: give a Hugging Face directory, a checkpoint or a "
                "run directory"
            )
    suites = load_suites(known.problems)  # a mistake here need not wait for the configuration
    if known.samples is not None:
        overrides.append(f"evaluation.samples={known.samples}")
    with_config(
        [*_config_arguments(known), *overrides],
        lambda config: _evaluate_command(config, known, suites or own_suites(config)),
    )


def load_suites(named: Sequence[str]) -> Suites:
    """Problem files by suite: the name in ``NAME=FILE``, else the file's own.

    Raises:
        ConfigError: two of one name, or a file that is no problem file.
    """
    suites: Suites = {}
    for text in named:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = Path(text).stem, text
        if name in suites:
            raise ConfigError(f"--problems: two files are named {name!r}; say NAME=FILE")
        suites[name] = load_problems(path, key="--problems")
    return suites


def own_suites(config: PacedConfig) -> Suites:
    """The held-out problems that the configuration names.

    Raises:
        ConfigError: it names none.
    """
    files = {
        "heldout": config.data.validation_problems,
        "forgetting": config.data.forgetting_problems,
    }
    suites = load_suites([f"{name}={path}" for name, path in files.items() if path])
    if not suites:
        raise ConfigError(
            "--problems is not given and the configuration has neither data.validation_problems "
            "nor data.forgetting_problems: give a file"
        )
    return suites


def _config_arguments(arguments: argparse.Namespace) -> list[str]:
    """The recipe that was asked for, else that of the run which the model lies in.

    A model is asked with the prompts it was trained with; another template would measure that.
    """
    given: list[str] = []
    for flag in ("config_path", "config_name"):
        if value := getattr(arguments, flag):
            given += [f"--{flag.replace('_', '-')}", value]
    model = arguments.model.absolute()
    for folder in (model, *model.parents[:2]):  # RUN, RUN/hf or RUN/checkpoints/step_...
        if not given and (folder / "config.yaml").exists() and (folder / "metrics.jsonl").exists():
            Console(stderr=True).print(f"configuration of the run: {folder / 'config.yaml'}")
            own = ["--config-path", str(folder), "--config-name", "config"]
            return [*own, "rollout.endpoints=[]"]  # the servers of then
    return given


def _evaluate_command(config: PacedConfig, arguments: argparse.Namespace, suites: Suites) -> None:
    results: Results = {}
    with progress_bar() as bar, tempfile.TemporaryDirectory(prefix="nemo-paced-") as scratch:
        for label, path in (("baseline", arguments.baseline), ("model", arguments.model)):
            if path is not None:
                hf_dir = _as_hf(path, Path(scratch) / label)
                results[label] = _serve_and_evaluate(
                    config, hf_dir, suites, Path(scratch) / f"{label}-run", label, bar
                )
    console = Console()
    for suite in suites:
        _show(console, results, suite)
    if arguments.out:
        write_results(arguments.out, results, sampling_settings(config))
        Console(stderr=True).print(f"written: {arguments.out}")


def _serve_and_evaluate(
    config: PacedConfig, hf_dir: Path, suites: Suites, run_dir: Path, label: str, bar: Progress
) -> dict[str, Accuracy]:
    served = replace(config, student=replace(config.student, hf_path=str(hf_dir)))
    prompts = Prompts(hf_dir, config.data, config.teacher.privileged_context)
    for problems in suites.values():
        for problem in problems:
            prompts.student(problem)  # too long a prompt is named before the server starts
    notes = prepare.server_notes(bar)
    with prepare.student_sampler(served, run_dir, prompts, notes) as sampler:
        return {
            suite: evaluate(served, sampler, problems, label=f"{label} {suite}", bar=bar)
            for suite, problems in suites.items()
        }


def _as_hf(path: Path, scratch: Path) -> Path:
    """A Hugging Face directory as it is; a checkpoint exported to scratch space."""
    if (path / "config.json").exists():
        return path
    from nemo_paced.training.convert import export_hf

    export_hf(PacedConfig(), path, scratch)
    return scratch


def _show(console: Console, results: Results, suite: str) -> None:
    problems = len(next(iter(results.values()))[suite].per_problem)
    table = Table(title=f"{suite}, {problems} problems")
    for heading in ("model", "mean@k", "s.e.", "pass@k", "truncated", "tokens"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for label, suites in results.items():
        a = suites[suite]
        table.add_row(
            label, f"{a.mean:.3f}", f"{a.standard_error:.3f}", f"{a.pass_at_k:.3f}",
            f"{a.truncated:.3f}", f"{a.mean_length:.1f}",
        )  # fmt: skip
    console.print(table)
    if "baseline" in results:
        d = Difference.between(results["model"][suite], results["baseline"][suite])
        console.print(
            f"model - baseline: {d.mean:+.3f} +- {d.standard_error:.3f} (paired): {d.verdict()}"
        )
