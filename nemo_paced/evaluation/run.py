"""Accuracy of a model on a problem file: the command ``evaluate``."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from nemo_paced.compose import with_config
from nemo_paced.config import PacedConfig
from nemo_paced.data.problems import load_problems
from nemo_paced.evaluation.results import write_results
from nemo_paced.records import Problem
from nemo_paced.rollout.accuracy import Accuracy, Difference
from nemo_paced.training import prepare
from nemo_paced.training.progress import progress_bar
from nemo_paced.training.sampler import Sampler


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


def main(arguments: list[str]) -> None:
    """The command ``evaluate``."""
    parser = argparse.ArgumentParser(prog="nemo-paced evaluate", allow_abbrev=False)
    parser.add_argument("model", type=Path)
    parser.add_argument("--problems", type=Path, required=True)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--baseline", type=Path)
    parser.add_argument("--out", type=Path)
    known, rest = parser.parse_known_args(arguments)
    if known.samples is not None:
        rest.append(f"evaluation.samples={known.samples}")
    with_config(rest, lambda config: _evaluate_command(config, known))


def _evaluate_command(config: PacedConfig, arguments: argparse.Namespace) -> None:
    problems = load_problems(arguments.problems, key="--problems")
    suite = arguments.problems.stem
    results: dict[str, dict[str, Accuracy]] = {}
    with progress_bar() as bar, tempfile.TemporaryDirectory(prefix="nemo-paced-") as scratch:
        for label, path in (("baseline", arguments.baseline), ("model", arguments.model)):
            if path is not None:
                hf_dir = _as_hf(path, Path(scratch) / label)
                results[label] = {
                    suite: _serve_and_evaluate(config, hf_dir, problems, Path(scratch), label, bar)
                }
    _show(results, suite)
    if arguments.out:
        write_results(arguments.out, results, problems=str(arguments.problems))
        Console(stderr=True).print(f"written: {arguments.out}")


def _serve_and_evaluate(
    config: PacedConfig,
    hf_dir: Path,
    problems: list[Problem],
    scratch: Path,
    label: str,
    bar: Progress,
) -> Accuracy:
    served = replace(config, student=replace(config.student, hf_path=str(hf_dir)))
    prompts = prepare.make_prompts(served)
    for problem in problems:
        prompts.student(problem)
    with prepare.student_sampler(
        served, scratch / f"{label}-run", prompts, prepare.server_notes(bar)
    ) as sampler:
        return evaluate(served, sampler, problems, label=label, bar=bar)


def _as_hf(path: Path, scratch: Path) -> Path:
    """A Hugging Face directory as it is; a checkpoint exported to scratch space."""
    if (path / "config.json").exists():
        return path
    from nemo_paced.training.convert import export_hf

    export_hf(path, scratch)
    return scratch


def _show(results: dict[str, dict[str, Accuracy]], suite: str) -> None:
    table = Table(title=suite)
    for heading in ("model", "mean@k", "s.e.", "pass@k", "truncated", "tokens"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for label, suites in results.items():
        a = suites[suite]
        table.add_row(
            label, f"{a.mean:.3f}", f"{a.standard_error:.3f}", f"{a.pass_at_k:.3f}",
            f"{a.truncated:.3f}", f"{a.mean_length:.1f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    if "baseline" in results:
        d = Difference.between(results["model"][suite], results["baseline"][suite])
        console.print(
            f"model - baseline: {d.mean:+.3f} +- {d.standard_error:.3f} (paired): {d.verdict()}"
        )
