"""What has to exist before the first step: prompts, the served student and its pass rates.

``train`` makes here whatever is missing, and so does the command ``pass-rates``. What the teacher
has to answer before is in ``references.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.progress import Progress

from nemo_paced.config import PacedConfig
from nemo_paced.data.prompts import PromptKind, Prompts
from nemo_paced.errors import ConfigError, RolloutError
from nemo_paced.grading.verdicts import Verdicts, percent
from nemo_paced.hf.tokenizer import check_same_tokens
from nemo_paced.records import Outcome, Problem, Rollout
from nemo_paced.rollout.sampler import Sampler
from nemo_paced.rollout.sampling import SamplingSettings
from nemo_paced.rollout.served import evaluation_length, served_dtype, training_length
from nemo_paced.run.config_file import PASS_RATES_FILE
from nemo_paced.run.problems import ProblemTable, RunProblems
from nemo_paced.run.progress import bar_task, progress_bar, server_notes
from nemo_paced.weights.pass_rates import PassRateTable
from nemo_paced.weights.rounds import sample_in_rounds

logger = logging.getLogger(__name__)

WHY_CUT = (
    "Likely causes: a limit too short for a model that thinks (data.chat_template_kwargs), a token "
    "that ends its turns and is no stop token, or a student that has come to repeat itself"
)
# Share of problems at 0 or at 1 above which weights say little, and of responses that explains it.
_SETTLED, _MANY = 0.9, 0.3


def make_prompts(config: PacedConfig) -> Prompts:
    """Prompts of the run, after checking that both models mean the same by each token.

    Raises:
        ConfigError: there is no student, or the tokenizers differ.
    """
    if not config.student.hf_path:
        raise ConfigError("student.hf_path is empty: give the student's Hugging Face directory")
    if config.teacher.hf_path:
        check_same_tokens(config.student.hf_path, config.teacher.hf_path)
    context = config.teacher.privileged_context
    return Prompts(config.student.hf_path, config.data, context, config.evaluation)


def training_set(config: PacedConfig, run_dir: Path) -> tuple[ProblemTable, Prompts]:
    """The training problems and what makes their prompts, none of which is too long.

    Whatever cannot be used is named before work starts.

    Raises:
        ConfigError: see :meth:`RunProblems.read`, :func:`make_prompts`, :meth:`RunProblems.check`.
    """
    key, kept = "data.problems", RunProblems(run_dir)
    problems = kept.read(config.data.problems, key=key, data=config.data, tells=True)
    prompts = make_prompts(config)
    for kind in (PromptKind.student, PromptKind.teacher):
        kept.check(problems, prompts, kind, key=key)
    return problems, prompts


def student_sampler(
    config: PacedConfig,
    run_dir: Path,
    prompts: Prompts,
    notify: Callable[[str], None],
    *,
    beside_trainer: bool = False,
    max_model_len: int | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> Sampler:
    """The sampler of the student as it was before training; its files lie in ``run_dir``.

    Args:
        notify, meanwhile: as in :class:`Sampler`.
        max_model_len: the servers' context, tokens; ``None``: what training needs.
        beside_trainer: whether this node's first ``trainer.devices`` GPUs are the trainer's.
    """
    student, prompt_limit = Path(config.student.hf_path), config.data.max_prompt_length
    return Sampler(
        student,
        config.rollout,
        config.grading,
        seed=config.model.seed,
        dtype=served_dtype(config),
        max_model_len=max_model_len or training_length(config, student, prompt_limit),
        prompts=prompts,
        store_dir=run_dir / "rollouts",
        log_path=run_dir / "servers" / "student" / "server.log",
        notify=notify,
        meanwhile=meanwhile,
        trainer_gpus=config.trainer.devices if beside_trainer else 0,
    )


def evaluation_settings(config: PacedConfig, max_tokens: int | None = None) -> SamplingSettings:
    """How held-out problems are sampled, from the ``evaluation`` block.

    Args:
        max_tokens: longest response; ``None``: what :func:`evaluation_length` says of the student.
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
        prompt=PromptKind.evaluation,
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
    """Estimate the table of pass rates from graded rollouts of the served student, and write it.

    Each problem gets ``weights.num_rollouts``, or as many in the mean with ``weights.adaptive``.

    Args:
        step: optimizer steps behind the served weights.
    """
    settings = SamplingSettings(
        num_samples=config.weights.num_rollouts,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        max_tokens=config.data.max_response_length,
    )

    def sample(num_samples: Mapping[str, int] | None = None) -> Sequence[Rollout]:
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
    seen = _Seen()
    table = PassRateTable.estimate(
        map(seen.rollout, rollouts), problems, config.weights, student_step=step
    )
    if table.is_unknown:
        raise RolloutError(
            f"none of {len(seen.verdicts)} responses has a verdict: grading.verifier "
            f"{config.grading.verifier} took above grading.time_limit_s "
            f"{config.grading.time_limit_s:g} for each, or its process ended. The responses are "
            "kept, and are graded again with another verifier or limit"
        )
    seen.verdicts.write(run_dir / "pass_rates" / f"step_{step:08d}.verdicts.json")
    save_table(table, run_dir, step)
    _tell_of_estimate(config, table, seen, step)
    return table


class _Seen:
    """Counts of what rollouts pass by, which are many."""

    def __init__(self) -> None:
        self.verdicts, self.cut = Verdicts(), 0

    def rollout(self, rollout: Rollout) -> Rollout:
        self.verdicts.add(rollout)
        self.cut += rollout.truncated
        return rollout


def _tell_of_estimate(config: PacedConfig, table: PassRateTable, seen: _Seen, step: int) -> None:
    """Log what an estimate found, and what is likely wrong where it says little.

    Raises:
        RolloutError: more responses were cut than ``rollout.max_truncated_share``.
    """
    rates, number = table.pass_rates.tolist(), len(seen.verdicts)
    cut, silent = seen.cut / number, seen.verdicts.share(Outcome.unanswered)
    limit = config.data.max_response_length
    logger.info(
        "pass rates at step %d: mean %.3f, %d of %d problems at 0, %d at 1; of %d responses: %s; "
        "%s were cut at %d tokens",
        step, np.nanmean(rates), rates.count(0.0), len(rates), rates.count(1.0), number,
        seen.verdicts.outcomes_line(), percent(cut), limit,
    )  # fmt: skip
    logger.info("verdicts at step %d: %s", step, seen.verdicts.grounds_line())
    if open_ones := seen.verdicts.number(Outcome.timed_out):
        logger.warning(
            "%d of %d responses have no verdict and do not count: the verifier took above "
            "grading.time_limit_s %g, or its process ended",
            open_ones, number, config.grading.time_limit_s,
        )  # fmt: skip
    settled = rates.count(0.0) + rates.count(1.0)
    if settled >= _SETTLED * len(rates):
        why = []
        if cut >= _MANY:
            why.append(f"{cut:.0%} of the responses were cut. {WHY_CUT}.")
        if silent >= _MANY:
            why.append(
                f"{silent:.0%} of the responses had no answer that grading.verifier "
                f"{config.grading.verifier} reads: does data.prompt_template ask for one?"
            )
        logger.warning(
            "%d of %d problems lie at a pass rate of 0 or 1, where weights say little: choose "
            "problems that the student solves now and then. %s",
            settled, len(rates), " ".join(why),
        )  # fmt: skip
    if cut > config.rollout.max_truncated_share:
        raise RolloutError(
            f"{cut:.0%} of {number} responses were cut at data.max_response_length {limit}, "
            f"above rollout.max_truncated_share {config.rollout.max_truncated_share:g}. {WHY_CUT}. "
            "The table is kept"
        )


def save_table(table: PassRateTable, run_dir: Path, step: int) -> None:
    """Write the table as the version of ``step``, and as what the next checkpoint takes along."""
    table.write(run_dir / "pass_rates" / f"step_{step:08d}.parquet")
    table.write(run_dir / PASS_RATES_FILE)


def pass_rates(config: PacedConfig, run_dir: Path) -> Path:
    """The command ``pass-rates``: sample, grade, weigh; returns the table's path."""
    problems, prompts = training_set(config, run_dir)
    with (
        progress_bar() as bar,
        student_sampler(config, run_dir, prompts, server_notes(bar)) as sampler,
    ):
        estimate_pass_rates(config, problems, sampler, run_dir, step=0, bar=bar)
    return run_dir / PASS_RATES_FILE
