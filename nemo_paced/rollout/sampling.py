"""K graded rollouts a problem from a served model, asking only for what the store lacks."""

from __future__ import annotations

import hashlib
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

from nemo_paced.data.prompts import PromptKind, Prompts
from nemo_paced.files import digest
from nemo_paced.grading.grader import Grader, rules
from nemo_paced.records import Problem, Rollout
from nemo_paced.rollout.store import Key, RolloutStore, StoredRollouts
from nemo_paced.serving.client import RolloutClient
from nemo_paced.serving.completions import Completion, SampleRequest

logger = logging.getLogger(__name__)

DIGITS = 12  # hex digits of what a rollout was asked and graded with
SAID_EVERY_S = 60.0  # between two lines about stored rollouts that are graded again
GRADED_AT_ONCE = 512  # stored rollouts that are graded again before they are written


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How responses are sampled.

    Attributes:
        num_samples: responses to each problem.
        max_tokens: longest response, tokens.
        prompt: whose prompt is asked with (the teacher's, for references).
    """

    num_samples: int
    temperature: float
    top_p: float
    max_tokens: int
    prompt: PromptKind = PromptKind.student


def sampling_seed(run_seed: int, purpose: str, step: int, problem_id: str, sample: int) -> int:
    """A seed of 31 bits, hashed from the arguments: a repeated request asks for the same."""
    text = f"{run_seed}/{purpose}/{step}/{problem_id}/{sample}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def sample_rollouts(
    problems: Sequence[Problem],
    *,
    prompts: Prompts,
    client: RolloutClient,
    store: RolloutStore,
    step: int,
    purpose: str,
    settings: SamplingSettings,
    samples_per_request: int,
    run_seed: int,
    grader: Grader,
    num_samples: Mapping[str, int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> StoredRollouts:
    """Rollouts of every problem, samples in order; each is stored as soon as it is finished.

    Grading and writing run in threads beside the requests. A stored rollout of another prompt or of
    other settings is sampled again, one that was graded otherwise is graded again. Prompts are made
    when they are asked, and rollouts read when they are looked at: a training set's would fill the
    memory.

    Args:
        num_samples: responses by problem id, where they differ; else ``settings.num_samples``.
        step: optimizer steps behind the served weights.
        samples_per_request: at most so many; the token route refuses more than a server decodes at
            once (``rollout.max_num_seqs``).
        purpose: keeps apart what is sampled at the same step (``pass_rates``, ``train``, ...).
        progress: called with (problems finished, problems in all).
    """
    by_id = {problem.id: problem for problem in problems}
    asked, graded = _Asked(prompts, settings), _GradedBy(grader)
    wanted = num_samples or dict.fromkeys(by_id, settings.num_samples)
    missing: list[Missing] = []
    outdated: list[Key] = []
    for name, problem in by_id.items():
        lacking = []
        for sample in range(wanted[name]):
            key = (purpose, step, name, sample)
            if not store.holds(key, asked.of(problem)):
                lacking.append(sample)
            elif store.graded(key) != graded.of(problem):
                outdated.append(key)
        missing += [Missing(name, few) for few in in_requests(lacking, samples_per_request)]
    _grade_again(outdated, by_id, store, graded, prompts, grader)
    requests = (
        _request(by_id[each.problem_id], each.samples, prompts, settings, run_seed, purpose, step)
        for each in long_tail_first(missing, store, run_seed)
    )
    open_requests = Counter(each.problem_id for each in missing)
    finished, counting = len(by_id) - len(open_requests), threading.Lock()

    def keep(request: SampleRequest, completions: list[Completion]) -> None:
        nonlocal finished
        problem = by_id[request.key]
        rollouts = (
            _rollout(problem, completion, sample, step, request.seed, prompts, asked.of(problem))
            for sample, completion in enumerate(completions, request.first_sample)
        )
        by = graded.of(problem)
        store.append(purpose, [_graded(each, problem, prompts, grader, by) for each in rollouts])
        with counting:
            open_requests[request.key] -= 1
            if open_requests[request.key]:
                return
            finished += 1
            if progress:
                progress(finished, len(by_id))

    if missing:
        client.sample(requests, on_result=keep)
    keys = [
        (purpose, step, problem.id, sample)
        for problem in problems
        for sample in range(wanted[problem.id])
    ]
    return StoredRollouts(store, keys)


class _Asked:
    """What a problem's rollouts depend on besides model, step and seed, as a digest."""

    def __init__(self, prompts: Prompts, settings: SamplingSettings) -> None:
        self._prompts, self._kind = prompts, settings.prompt
        lengths = [settings.max_tokens, prompts.stop_token_ids]
        self._common = [settings.temperature, settings.top_p, *lengths]
        self._known: dict[str, str] = {}

    def of(self, problem: Problem) -> str:
        if problem.id not in self._known:
            text = self._prompts.text(problem, self._kind)
            self._known[problem.id] = digest([*self._common, text], DIGITS)
        return self._known[problem.id]


class _GradedBy:
    """What the verdicts on a problem's rollouts depend on besides their text, as a digest."""

    def __init__(self, grader: Grader) -> None:
        self._rules = rules(grader.config)
        self._known: dict[tuple[str, ...], str] = {}

    def of(self, problem: Problem) -> str:
        answers = (problem.answer, *problem.accepted)
        if answers not in self._known:
            self._known[answers] = digest([*self._rules, *answers], DIGITS)
        return self._known[answers]


def _grade_again(
    keys: Sequence[Key],
    problems: Mapping[str, Problem],
    store: RolloutStore,
    graded: _GradedBy,
    prompts: Prompts,
    grader: Grader,
) -> None:
    """Replace stored verdicts of other answers, settings or rules; nothing is sampled."""
    if not keys:
        return

    def grade(key: Key) -> tuple[Rollout, bool]:
        before, problem = store.get(*key), problems[key[2]]
        assert before is not None, "it was looked for in this store"
        now = _graded(before, problem, prompts, grader, graded.of(problem))
        return now, now.outcome is not before.outcome

    logger.info("%d stored rollouts were graded otherwise: they are graded again", len(keys))
    changed, said = 0, time.monotonic()
    with ThreadPoolExecutor(grader.config.num_workers) as threads:
        for begin in range(0, len(keys), GRADED_AT_ONCE):
            found = list(threads.map(grade, keys[begin : begin + GRADED_AT_ONCE]))
            store.append(keys[begin][0], [rollout for rollout, _ in found])
            changed += sum(is_other for _, is_other in found)
            if time.monotonic() - said > SAID_EVERY_S:
                said = time.monotonic()
                logger.info("graded again: %d of %d so far", begin + len(found), len(keys))
    logger.info("graded again: %d of %d verdicts are others", changed, len(keys))


def in_requests(missing: Sequence[int], limit: int) -> list[list[int]]:
    """The sample numbers of each request: consecutive ones, at most ``limit`` of them.

    They are cut at multiples of the limit, whatever is missing: what a killed run asks for again
    are the same requests with the same seeds, as long as the limit stays the same.
    """
    numbered = groupby(enumerate(missing), key=lambda each: (each[1] // limit, each[1] - each[0]))
    return [[sample for _, sample in group] for _, group in numbered]


class Missing(NamedTuple):
    """Samples of a problem that are asked for in one request."""

    problem_id: str
    samples: list[int]


def long_tail_first(missing: Sequence[Missing], store: RolloutStore, seed: int) -> list[Missing]:
    """The order to ask in: first those of unknown length, shuffled, then the longest known.

    A long response that is started last keeps every server but one waiting for it.
    """
    shuffled = random.Random(seed).sample(list(missing), len(missing))
    unknown = [each for each in shuffled if store.known_length(each.problem_id) is None]
    known = [each for each in shuffled if store.known_length(each.problem_id) is not None]
    return unknown + sorted(known, key=lambda each: -(store.known_length(each.problem_id) or 0))


def _request(
    problem: Problem,
    missing: list[int],
    prompts: Prompts,
    settings: SamplingSettings,
    run_seed: int,
    purpose: str,
    step: int,
) -> SampleRequest:
    return SampleRequest(
        key=problem.id,
        prompt_ids=prompts.of(problem, settings.prompt),
        n=len(missing),
        seed=sampling_seed(run_seed, purpose, step, problem.id, missing[0]),
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_tokens=settings.max_tokens,
        stop_token_ids=prompts.stop_token_ids,
        first_sample=missing[0],
    )


def _rollout(
    problem: Problem,
    completion: Completion,
    sample: int,
    step: int,
    seed: int,
    prompts: Prompts,
    asked: str,
) -> Rollout:
    return Rollout(
        response_id=f"{problem.id}/{step}/{sample}",
        problem_id=problem.id,
        response_ids=completion.token_ids,
        truncated=completion.finish_reason == "length",
        sample=sample,
        step=step,
        seed=seed,
        logprobs=completion.logprobs,
        weight_versions=completion.weight_versions,
        text=prompts.decode(completion.token_ids),
        asked=asked,
    )


def _graded(
    rollout: Rollout, problem: Problem, prompts: Prompts, grader: Grader, graded: str
) -> Rollout:
    """A rollout with its verdict, by what ``graded`` stands for."""
    verdict = grader.grade(
        rollout.text,
        problem.answer,
        accepted=problem.accepted,
        truncated=rollout.truncated,
        said=_said(rollout.response_ids, prompts),
    )
    return replace(
        rollout,
        outcome=verdict.outcome,
        extracted=verdict.extracted,
        evidence=verdict.evidence.value,
        comparison=verdict.comparison.value,
        reason=verdict.reason,
        graded=graded,
    )


def _said(ids: tuple[int, ...], prompts: Prompts) -> str | None:
    """Text behind a thought, of which tokens tell where it ends; ``None``: there is no thought.

    A template may have opened it, and its marks may be special tokens, which the text lacks.
    """
    if not prompts.thoughts:
        return None
    length, ends = prompts.thoughts.length(ids)
    if not length:
        return None
    return prompts.decode(ids[length:]) if ends else ""
