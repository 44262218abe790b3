"""Stored responses of forward KL: y_T of every problem, sampled from the teacher or read.

y_T ~ P_T(. | x, y_E), one of each problem. ``references.wrong`` says what becomes of one whose
answer is not the problem's: kept (the paper's), dropped, or sampled again. Attempt k is sample k of
its problem in the store, so an interrupted or a longer search asks for no sample twice.

A dropped problem has no response to train along. In stages with ``responses=references`` it has
weight 0: it counts in N and is not run. The other weights are scaled up so that the mean over the
*whole* training set is 1 there too, as it is with problems whose pass rate gives them 0. Dropping
then changes which problems are learnt from and not the size of the steps. On-policy stages need no
reference and use the table's weights as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from rich.progress import Progress

from nemo_paced.config import (
    PacedConfig,
    ReferencesConfig,
    ReferenceSource,
    RefitBackend,
    RolloutPlacement,
    WrongReferences,
)
from nemo_paced.data.prompts import PromptKind, Prompts
from nemo_paced.data.references import (
    Reference,
    References,
    made_with,
    read_references,
    solutions,
    write_references,
)
from nemo_paced.grading.verdicts import Verdicts
from nemo_paced.records import Outcome, Problem, Rollout
from nemo_paced.rollout.sampler import Sampler
from nemo_paced.rollout.sampling import SamplingSettings
from nemo_paced.rollout.served import served_dtype, training_length
from nemo_paced.run.progress import bar_task, progress_bar, server_notes
from nemo_paced.training.prepare import training_set

logger = logging.getLogger(__name__)

REFERENCES_FILE = "references.jsonl"

# (problems, n by problem id) -> samples 0..n-1 of each; only those that do not exist are asked for
SampleFromTeacher = Callable[[Sequence[Problem], Mapping[str, int]], Sequence[Rollout]]


def load_references(
    config: PacedConfig,
    problems: Sequence[Problem],
    prompts: Prompts,
    run_dir: Path,
    bar: Progress,
    meanwhile: Callable[[], None] | None = None,
) -> References:
    """The stored response of every problem but the dropped ones, made first where it is missing.

    Args:
        meanwhile: called while the teacher's servers start, if they have to.

    Raises:
        ConfigError: a problem without one (no solution, not in the file), or all are dropped.
    """
    source = config.references.source
    if source is ReferenceSource.solution:
        return solutions(problems, prompts)
    path = run_dir / REFERENCES_FILE
    if source is ReferenceSource.file:
        path = Path(config.references.path or "")
    elif not _is_made(config, run_dir):
        sample_references(config, problems, prompts, run_dir, bar, meanwhile)
    found = read_references(path, problems, prompts)
    if dropped := len(problems) - len(found):
        logger.info(
            "%d of %d problems have no reference: weight 0 in stages with responses=references",
            dropped, len(problems),
        )  # fmt: skip
    return found


def to_be_sampled(config: PacedConfig, run_dir: Path) -> bool:
    """Whether a run is going to ask the teacher for references.

    Raises:
        ConfigError: a malformed line in references.jsonl.
    """
    if config.references.source is not ReferenceSource.teacher or not config.needs_references:
        return False
    return not _is_made(config, run_dir)


def sample_references(
    config: PacedConfig,
    problems: Sequence[Problem],
    prompts: Prompts,
    run_dir: Path,
    bar: Progress,
    meanwhile: Callable[[], None] | None = None,
) -> Path:
    """Sample from the teacher, which sees the privileged context, and write references.jsonl.

    Args:
        meanwhile: called while the teacher's servers start.
    """
    settings = config.references
    sampling = SamplingSettings(
        num_samples=1,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_tokens=config.data.max_response_length,
        prompt=PromptKind.teacher,
    )

    def sample(asked: Sequence[Problem], wanted: Mapping[str, int]) -> Sequence[Rollout]:
        attempt = max(wanted.values())
        what = "references" if attempt == 1 else f"references, attempt {attempt}"
        with bar_task(bar, what, len(asked)) as advance:
            return sampler.sample(
                asked,
                purpose="references",
                step=0,
                settings=sampling,
                num_samples=wanted,
                progress=advance,
            )

    path, tally = run_dir / REFERENCES_FILE, Tally()
    with _teacher_sampler(config, run_dir, prompts, bar, meanwhile) as sampler:
        write_references(path, map(tally.reference, _choose(problems, sample, settings)))
    logger.info(tally.told(settings.wrong))
    return path


class Tally:
    """Counts of references that pass by, which are many."""

    def __init__(self) -> None:
        self._later = self._truncated = self._attempts = 0
        self._verdicts = Verdicts()

    def reference(self, reference: Reference) -> Reference:
        """Count one, which is returned."""
        self._later += reference.rollout.correct and reference.attempts > 1
        self._truncated += reference.rollout.truncated
        self._attempts += reference.attempts
        self._verdicts.add(reference.rollout)
        return reference

    def told(self, wrong: WrongReferences) -> str:
        """The log line: how many are right, and what became of the others."""
        became = "dropped" if wrong is WrongReferences.drop else "kept"
        right, all_ = self._verdicts.number(Outcome.right), len(self._verdicts)
        return (
            f"references: {right} of {all_} teacher responses are right, {self._later} "
            f"of them at a later attempt; {all_ - right} others are {became}; "
            f"{self._truncated} truncated; {self._attempts} sampled; "
            f"{self._verdicts.outcomes_line()}; {self._verdicts.grounds_line()}"
        )


def references(config: PacedConfig, run_dir: Path) -> Path:
    """The command ``references``: teacher responses to every problem; returns the file's path."""
    problems, prompts = training_set(config, run_dir)
    with progress_bar() as bar:
        return sample_references(config, problems, prompts, run_dir, bar)


def _is_made(config: PacedConfig, run_dir: Path) -> bool:
    """Whether references.jsonl is there, and made with these settings.

    A file of another ``references.wrong`` or ``references.max_attempts`` is made anew from the
    samples that there are, and from new ones where they are too few.
    """
    path = run_dir / REFERENCES_FILE
    return path.exists() and made_with(path, config.references)


def _choose(
    problems: Sequence[Problem], sample: SampleFromTeacher, settings: ReferencesConfig
) -> Iterator[Reference]:
    """One reference of each problem, in their order; a round of samples for each attempt.

    What a round asks for follows from the verdicts of those before it, which are in the store.
    """
    tried: dict[str, list[_Attempt]] = {}
    asked = list(problems)
    for attempt in range(1, settings.attempts + 1):
        rollouts = sample(asked, {problem.id: attempt for problem in asked})
        tried |= {problem.id: [] for problem in asked}
        for place, rollout in enumerate(rollouts):
            tried[rollout.problem_id].append(_Attempt(rollouts, place, _is_wrong(rollout)))
        asked = [problem for problem in asked if tried[problem.id][-1].wrong]
        if not asked:
            break
    for problem in problems:
        attempts = tried[problem.id]
        # what stays wrong is what references.wrong=keep would have taken
        chosen = attempts[0] if attempts[-1].wrong else attempts[-1]
        dropped = settings.wrong is WrongReferences.drop and chosen.wrong
        yield Reference(chosen.rollouts[chosen.place], len(attempts), dropped)


class _Attempt(NamedTuple):
    """Where a graded rollout is, and whether it is wrong: rollouts themselves are many."""

    rollouts: Sequence[Rollout]
    place: int
    wrong: bool


def _is_wrong(rollout: Rollout) -> bool:
    """Whether a response was found wrong; one without a verdict is kept."""
    return rollout.has_verdict and not rollout.correct


def _teacher_sampler(
    config: PacedConfig,
    run_dir: Path,
    prompts: Prompts,
    bar: Progress,
    meanwhile: Callable[[], None] | None,
) -> Sampler:
    """The teacher's sampler: over ``references.endpoints``, else with servers of our own."""
    endpoints = list(config.references.endpoints)
    replicas = 1 if endpoints else config.rollout.num_replicas
    rollout = replace(
        config.rollout,
        endpoints=endpoints,
        num_replicas=replicas,
        placement=RolloutPlacement.separate,  # nobody trains meanwhile
        refit=RefitBackend.auto,
    )
    teacher, prompt_limit = Path(config.teacher_hf_path), config.data.max_teacher_prompt_length
    return Sampler(
        teacher,
        rollout,
        config.grading,
        seed=config.model.seed,
        dtype=served_dtype(config),
        max_model_len=training_length(config, teacher, prompt_limit),
        prompts=prompts,
        store_dir=run_dir / "references",
        log_path=run_dir / "servers" / "teacher" / "server.log",
        notify=server_notes(bar),
        meanwhile=meanwhile,
    )
