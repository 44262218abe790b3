"""What has to exist before the first step: references and pass rates. Both are resumable.

Used by ``train`` for whatever is missing, and by the commands ``references`` and ``pass-rates``.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.progress import Progress

from nemo_paced.config import PacedConfig, ReferenceSource, to_dict
from nemo_paced.data.problems import load_problems
from nemo_paced.errors import ConfigError
from nemo_paced.hf.tokenizer import Prompts, check_same_tokens
from nemo_paced.records import Problem, Response, Rollout
from nemo_paced.rollout.adaptive import sample_in_rounds
from nemo_paced.rollout.pass_rates import PassRateTable
from nemo_paced.rollout.sampling import SamplingSettings
from nemo_paced.training.progress import progress_bar
from nemo_paced.training.sampler import Sampler, evaluation_length

logger = logging.getLogger(__name__)

PASS_RATES_FILE = "pass_rates.parquet"
REFERENCES_FILE = "references.jsonl"


def make_prompts(config: PacedConfig) -> Prompts:
    """Prompts of the run, after checking that both models mean the same by each token."""
    if not config.student.hf_path:
        raise ConfigError("student.hf_path is empty: give the student's Hugging Face directory")
    if config.teacher.hf_path:
        check_same_tokens(config.student.hf_path, config.teacher.hf_path)
    return Prompts(config.student.hf_path, config.data, config.teacher.privileged_context)


def check_prompts(problems: Sequence[Problem], prompts: Prompts) -> None:
    """Build every prompt once: a problem that is too long is named before anything starts."""
    for problem in problems:
        prompts.student(problem)
        prompts.teacher(problem)


def student_sampler(
    config: PacedConfig,
    run_dir: Path,
    prompts: Prompts,
    notify: Callable[[str], None],
    *,
    beside_trainer: bool = False,
    max_model_len: int | None = None,
) -> Sampler:
    return Sampler(
        config,
        Path(config.student.hf_path),
        prompts=prompts,
        store_dir=run_dir / "rollouts",
        log_path=run_dir / "logs" / "sidecar.log",
        prompt_limit=config.data.max_prompt_length,
        max_model_len=max_model_len,
        notify=notify,
        trainer_gpus=config.trainer.devices if beside_trainer else 0,
    )


def evaluation_settings(config: PacedConfig, max_tokens: int | None = None) -> SamplingSettings:
    """How held-out problems are sampled: the ``evaluation`` block.

    Args:
        max_tokens: of a response; ``None``: what :func:`evaluation_length` says of the student.
    """
    evaluation = config.evaluation
    if max_tokens is None:
        student, prompt = Path(config.student.hf_path), config.data.max_prompt_length
        max_tokens = evaluation_length(config, student, prompt)
    return SamplingSettings(
        num_samples=evaluation.samples,
        temperature=evaluation.temperature,
        top_p=evaluation.top_p,
        max_tokens=max_tokens,
    )


def estimate_pass_rates(
    config: PacedConfig,
    problems: Sequence[Problem],
    sampler: Sampler,
    run_dir: Path,
    *,
    step: int,
    bar: Progress,
) -> PassRateTable:
    """Graded rollouts of every problem by the served student; writes the table, also by its step.

    ``weights.num_rollouts`` of each, or as many in the mean with ``weights.adaptive``.
    """
    settings = SamplingSettings(
        num_samples=config.weights.num_rollouts,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        max_tokens=config.data.max_response_length,
    )

    def sample(num_samples: Mapping[str, int] | None = None) -> list[Rollout]:
        with bar_task(bar, f"pass rates at step {step}", len(problems)) as advance:
            return sampler.sample(
                problems,
                purpose="pass_rates",
                step=step,
                settings=settings,
                num_samples=num_samples,
                progress=advance,
            )

    adaptive = config.weights.adaptive.enabled
    rollouts = sample_in_rounds(problems, sample, config.weights) if adaptive else sample()
    table = PassRateTable.estimate(rollouts, problems, config.weights, student_step=step)
    save_table(table, run_dir, step)
    rates = [row.pass_rate for row in table.rows]
    logger.info(
        "pass rates at step %d: mean %.3f, %d of %d problems at 0, %d at 1",
        step, sum(rates) / len(rates), rates.count(0.0), len(rates), rates.count(1.0),
    )  # fmt: skip
    return table


def save_table(table: PassRateTable, run_dir: Path, step: int) -> None:
    """As the version of ``step``, and as the one that the next checkpoint takes along."""
    table.write(run_dir / "pass_rates" / f"step_{step:08d}.parquet")
    table.write(run_dir / PASS_RATES_FILE)


def load_references(
    config: PacedConfig, problems: Sequence[Problem], prompts: Prompts, run_dir: Path, bar: Progress
) -> dict[str, Response]:
    """The stored response of every problem, made first where it does not exist yet.

    Raises:
        ConfigError: a problem without one (no solution, not in the file).
    """
    source = config.references.source
    if source is ReferenceSource.solution:
        return {problem.id: _from_solution(problem, prompts) for problem in problems}
    path = run_dir / REFERENCES_FILE
    if source is ReferenceSource.file:
        path = Path(config.references.path or "")
    elif not path.exists():
        sample_references(config, problems, prompts, run_dir, bar)
    return read_references(path, problems, prompts)


def sample_references(
    config: PacedConfig, problems: Sequence[Problem], prompts: Prompts, run_dir: Path, bar: Progress
) -> Path:
    """y_T of every problem: one sample of the teacher, which sees the privileged context."""
    teacher_served = _with_teacher_endpoints(config)
    sampler = Sampler(
        teacher_served,
        Path(config.teacher_hf_path),
        prompts=prompts,
        store_dir=run_dir / "references",
        log_path=run_dir / "logs" / "teacher_server.log",
        prompt_limit=config.data.max_teacher_prompt_length,
        notify=server_notes(bar),
    )
    with sampler, bar_task(bar, "references", len(problems)) as advance:
        rollouts = sampler.sample(
            problems,
            purpose="references",
            step=0,
            settings=SamplingSettings(
                num_samples=1,
                temperature=config.references.temperature,
                top_p=config.references.top_p,
                max_tokens=config.data.max_response_length,
                teacher_prompt=True,
            ),
            progress=advance,
        )
    lines = [
        json.dumps(
            {
                "id": r.problem_id,
                "response_ids": r.response_ids,
                "truncated": r.truncated,
                "correct": r.correct,
                "response": r.text,
            }
        )
        for r in rollouts
    ]
    path = run_dir / REFERENCES_FILE
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in lines))
    os.replace(temporary, path)
    logger.info(
        "references: %d of %d teacher responses are right, %d truncated; wrong ones are kept",
        sum(bool(r.correct) for r in rollouts), len(rollouts), sum(r.truncated for r in rollouts),
    )  # fmt: skip
    return path


def read_references(
    path: Path, problems: Sequence[Problem], prompts: Prompts
) -> dict[str, Response]:
    """Responses from JSONL with ``id`` and ``response_ids``, or ``response`` as text.

    Raises:
        ConfigError: no such file, a malformed line, or problems that it lacks.
    """
    if not path.is_file():
        raise ConfigError(f"references.path is {str(path)!r}: no such file")
    found: dict[str, Response] = {}
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                ids = tuple(row["response_ids"]) if "response_ids" in row else None
                ids = ids or prompts.response(row["response"])
                found[row["id"]] = Response(
                    f"{row['id']}/reference", row["id"], ids, bool(row.get("truncated", False))
                )
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"{path}:{number}: a JSON object with id and response_ids (or response) is "
                    f"needed: {error!r}"
                ) from error
    absent = [problem.id for problem in problems if problem.id not in found]
    if absent:
        raise ConfigError(
            f"{path} lacks {len(absent)} of the {len(problems)} problems ({', '.join(absent[:3])})"
        )
    return found


@contextmanager
def bar_task(bar: Progress, description: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A task of the progress bar for the length of a ``with``; yields progress(done, total)."""
    task = bar.add_task(description, total=total, note="")
    try:
        yield lambda done, total: bar.update(task, completed=done)
    finally:
        bar.remove_task(task)


def server_notes(bar: Progress) -> Callable[[str], None]:
    """Shows what a starting server says, for as long as it says something."""
    task = bar.add_task("rollout server", total=None, note="", visible=False)
    return lambda note: bar.update(task, note=note, visible=bool(note))


def pass_rates(config: PacedConfig, run_dir: Path) -> Path:
    """The command ``pass-rates``: sample, grade, weigh; returns the table's path."""
    problems = load_problems(config.data.problems)
    prompts = make_prompts(config)
    check_prompts(problems, prompts)
    with (
        progress_bar() as bar,
        student_sampler(config, run_dir, prompts, server_notes(bar)) as sampler,
    ):
        estimate_pass_rates(config, problems, sampler, run_dir, step=0, bar=bar)
    return run_dir / PASS_RATES_FILE


def references(config: PacedConfig, run_dir: Path) -> Path:
    """The command ``references``: teacher responses to every problem; returns the file's path."""
    problems = load_problems(config.data.problems)
    prompts = make_prompts(config)
    check_prompts(problems, prompts)
    with progress_bar() as bar:
        return sample_references(config, problems, prompts, run_dir, bar)


def _from_solution(problem: Problem, prompts: Prompts) -> Response:
    if problem.solution is None:
        raise ConfigError(
            f"references.source is solution and problem {problem.id!r} has none: add the field, or "
            "set references.source=teacher"
        )
    ids = prompts.response(problem.solution)
    return Response(f"{problem.id}/reference", problem.id, ids, ids[-1] != prompts.eos_id)


def _with_teacher_endpoints(config: PacedConfig) -> PacedConfig:
    """Served by ``references.endpoints``, else by servers of our own while they are needed."""
    endpoints = list(config.references.endpoints)
    replicas = 1 if endpoints else config.rollout.num_replicas
    return replace(
        config, rollout=replace(config.rollout, endpoints=endpoints, num_replicas=replicas)
    )


def save_config(config: PacedConfig, run_dir: Path) -> None:
    """The resolved configuration, beside what it made."""
    from omegaconf import OmegaConf

    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(to_dict(config)))
