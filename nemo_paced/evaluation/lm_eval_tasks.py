"""Tasks of EleutherAI's lm-eval (MMLU and any other) on a served model: extra ``[eval]``.

lm-eval builds the few-shot prompts and scores the answers; this module chooses the questions, asks
our servers, and keeps one value a question, so that two models are compared question by question.

A task's data set is fetched by lm-eval, unless a task file of your own under ``include_path`` names
local ones (``dataset_path: json`` with ``dataset_kwargs: {data_files: ...}``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_paced.config import LmEvalConfig
from nemo_paced.errors import ConfigError, RolloutError
from nemo_paced.grading.accuracy import Accuracy

DRAW_SEED = 0  # of the questions drawn under a limit: every model gets the same
FEWSHOT_SEED = 1234  # lm-eval's own default
# what a task's file says of how its questions are put
_PUT_BY = ("description", "doc_to_text", "doc_to_target", "doc_to_choice")


@dataclass(frozen=True, slots=True)
class Suite:
    """The tasks that one name in ``evaluation.lm_eval.tasks`` stands for.

    Attributes:
        tasks: lm-eval's tasks by name.
        questions: of each task, their numbers in its data set.
        metrics: of each task, the one that is reported.
        contents: of each task, a digest of these questions and of how they are put.
    """

    tasks: dict[str, Any]
    questions: dict[str, list[int]]
    metrics: dict[str, str]
    contents: dict[str, str]


def load_suites(settings: LmEvalConfig) -> dict[str, Suite]:
    """The suites that the settings name, with their data sets; empty where they name none.

    Raises:
        ConfigError: lm-eval is not installed, there is no such task, its data set cannot be read,
            it runs code that the model writes, or none of its metrics is a mean over questions.
    """
    if not settings.tasks:
        return {}
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"evaluation.lm_eval.tasks is {settings.tasks} and lm-eval cannot be imported "
            f"({error}): pip install 'nemo-paced[eval]'"
        ) from error
    path = settings.include_path
    if path is not None and not Path(path).is_dir():
        raise ConfigError(f"evaluation.lm_eval.include_path is {path!r}: no such directory")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it says every task's every default
    # lm-eval's own task files are 12,000: they are read where one of them may be asked for
    manager = TaskManager(include_path=path, include_defaults=False)
    if not set(settings.tasks) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=path)
    return {name: _load(manager, name, settings) for name in settings.tasks}


def run_suite(
    suite: Suite,
    model: Any,
    settings: LmEvalConfig,
    cache: Path,
) -> Accuracy:
    """Ask a served model every question of a suite, and score its answers.

    Args:
        model: a :class:`~nemo_paced.evaluation.lm_eval_endpoint.ServedModel`.
        cache: file that keeps answers as they come; an interrupted run goes on from there.

    Raises:
        RolloutError: a request that failed after all its retries.
    """
    from lm_eval.api.model import CachingLM
    from lm_eval.evaluator import evaluate

    from nemo_paced.evaluation.lm_eval_endpoint import FAILED

    cached = CachingLM(model, str(cache))
    try:
        found = evaluate(
            lm=cached,
            task_dict={"tasks": suite.tasks, "groups": {}, "group_map": {}},
            samples=suite.questions,
            bootstrap_iters=0,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.apply_chat_template,
        )
    except FAILED as error:
        raise RolloutError(
            f"lm-eval could not ask the rollout server: {error!r}. What was answered is kept in "
            f"{cache}: start the same command again"
        ) from error
    finally:
        cached.dbdict.close()
    return _accuracy(found["samples"], suite, model)


def draw(sizes: Mapping[str, int], limit: int | None) -> dict[str, list[int]]:
    """Draw ``limit`` question numbers in all, in proportion to the tasks' sizes.

    The same are drawn every time. Shares are rounded by largest remainder, so that their sum is
    exact.

    Args:
        sizes: questions of each task.
        limit: ``None``: all questions.
    """
    total = sum(sizes.values())
    wanted = total if limit is None else min(limit, total)
    shares = {name: wanted * size // total for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: -(wanted * sizes[name] % total))
    for name in by_remainder[: wanted - sum(shares.values())]:
        shares[name] += 1
    return {
        name: sorted(random.Random(f"{DRAW_SEED}/{name}").sample(range(sizes[name]), share))
        for name, share in shares.items()
        if share
    }


def _load(manager: Any, name: str, settings: LmEvalConfig) -> Suite:
    try:
        tasks = manager.load([name])["tasks"]
        sizes = {task: len(loaded.eval_docs) for task, loaded in tasks.items()}
    except KeyError as error:
        raise ConfigError(
            f"evaluation.lm_eval.tasks names {name!r}: {error}; see `lm-eval ls tasks`, or give "
            "the directory of your own task files with --lm-eval-tasks"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"lm-eval's task {name!r} cannot be loaded: {error}. Without a network, give a task "
            "file that names local data with --lm-eval-tasks"
        ) from error
    questions = draw(sizes, settings.limit)
    tasks = {task: tasks[task] for task in questions}
    for task, loaded in tasks.items():
        if getattr(loaded, "UNSAFE_CODE", False):
            raise ConfigError(f"lm-eval's task {task!r} runs code that the model writes: refused")
        # a task whose own number of shots is 0 is made for 0
        own = loaded.get_config("num_fewshot")
        if own != 0 and settings.num_fewshot is not None:
            loaded.set_config(key="num_fewshot", value=settings.num_fewshot)
        elif own is None:
            loaded.set_config(key="num_fewshot", value=0)
        loaded.set_fewshot_seed(seed=FEWSHOT_SEED)
    metrics = {task: _metric(task, tasks[task]) for task in tasks}
    contents = {task: _contents(tasks[task], questions[task]) for task in tasks}
    return Suite(tasks, questions, metrics, contents)


def _contents(task: Any, numbers: list[int]) -> str:
    """A digest of a task's chosen questions and of how they are put.

    Task files of one name may hold other questions under the same numbers. What is no JSON, images
    and functions, counts by its type alone.
    """
    docs = task.eval_docs
    put = [task.get_config(name) for name in _PUT_BY]
    content = [put, [docs[number] for number in numbers]]
    text = json.dumps(content, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _metric(name: str, task: Any) -> str:
    """A task's first metric that is a mean over questions: standard errors need one value each."""
    from lm_eval.api.metrics import mean

    for metric, aggregation in task.aggregation().items():
        if aggregation is mean:
            return metric
    raise ConfigError(
        f"lm-eval's task {name!r} has no metric that is a mean over questions (it has "
        f"{', '.join(task.aggregation())}): differences could not be paired"
    )


def _accuracy(samples: dict[str, list[dict[str, Any]]], suite: Suite, model: Any) -> Accuracy:
    values: dict[str, float] = {}
    groups: dict[str, str] = {}
    cut = 0
    for task, rows in samples.items():
        for row in rows:
            if row["filter"] == rows[0]["filter"]:  # a task may read answers in several ways
                question = f"{task}/{row['doc_id']}"
                values[question] = float(row[suite.metrics[task]])
                groups[question] = task
                cut += any(_too_long(model, *arguments) for arguments in row["arguments"])
    return Accuracy.of_answers(
        values,
        groups,
        metric=", ".join(sorted(set(suite.metrics.values()))),
        truncated=cut / len(values),
    )


def _too_long(model: Any, context: str, answer: str | dict[str, Any]) -> bool:
    """Whether a prompt lost its beginning: ``answer`` is a text, or how one is generated."""
    if isinstance(answer, str):
        return len(model.tok_encode(context + answer)) > model.max_length
    room = model.max_length - answer.get("max_gen_toks", model._max_gen_toks)
    return len(model.tok_encode(context)) > room
