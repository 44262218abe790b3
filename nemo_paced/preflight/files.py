"""Preflight checks of problem files and prompts, the run directory, and room on the disk."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_paced.config import PacedConfig, Precision, ReferenceSource, TeacherPlacement
from nemo_paced.data.prompts import PromptKind, Prompts
from nemo_paced.errors import ConfigError, PacedError
from nemo_paced.hf.architectures import Architecture
from nemo_paced.preflight.findings import Finding, error, warning
from nemo_paced.preflight.inputs import Inputs
from nemo_paced.records import Problem
from nemo_paced.run import checkpoint_files
from nemo_paced.run.checkpoint_files import newest_checkpoint
from nemo_paced.run.fingerprint import DATA_FILE, check_data
from nemo_paced.run.problems import column, ids_without
from nemo_paced.sizing.parameters import model_parameters
from nemo_paced.teacher.kind import SignalKind
from nemo_paced.training import schedule
from nemo_paced.weights.pass_rates import PassRateTable

GIB = 2**30
_CHOICES, _LETTERS = re.compile(r"(?m)^\s*\(?B[).]"), frozenset("ABCDEFGHIJ")


def problem_prompts(inputs: Inputs) -> Iterator[Finding]:
    """Check that every prompt is within its limit and every privileged context is there."""
    if inputs.prompts is None:
        return
    for key, problems in inputs.problems.items():
        if key == "data.problems":
            yield from _missing_solutions(inputs, inputs.prompts)
        for kind in _kinds_of_prompts(inputs, key):
            try:
                if kind is PromptKind.teacher and _without_solution(inputs.prompts, problems):
                    solved = [problem for problem in problems if problem.solution is not None]
                    inputs.prompts.check(solved, kind)
                else:
                    inputs.kept.check(problems, inputs.prompts, kind, key=key)
            except ConfigError as refusal:
                yield error(key, str(refusal))
        if key != "data.problems" and inputs.student is not None:
            most = inputs.student.max_positions - 1
            for name, length in inputs.prompts.above(problems, PromptKind.evaluation, most)[:1]:
                yield error(
                    key,
                    f"the longest prompt, of problem {name!r}, has {length} tokens and the "
                    f"student's context {most + 1}: nothing is left for a response",
                    "remove the problem",
                )


def _without_solution(prompts: Prompts, problems: Sequence[Problem]) -> bool:
    """Whether the teacher's prompt shows solutions and some problem has none."""
    return prompts.needs_solution and bool(ids_without(problems, "solution"))


def answers(inputs: Inputs) -> Iterator[Finding]:
    """Check that the verifier suits the answers."""
    for key, problems in inputs.problems.items():
        yield from verifier_fits(inputs.config, problems, key)


def verifier_fits(config: PacedConfig, problems: Sequence[Problem], key: str) -> list[Finding]:
    """A warning where most answers are letters of choices and the verifier reads no choices."""
    verifier = config.grading.verifier
    if verifier not in ("math", "exact"):
        return []
    letters = sum(answer in _LETTERS for answer in column(problems, "answer"))
    if letters >= len(problems) / 2:  # seldom: statements are large
        letters = sum(p.answer in _LETTERS and bool(_CHOICES.search(p.problem)) for p in problems)
    if letters < len(problems) / 2:
        return []
    return [
        warning(
            key,
            f"{letters} of {len(problems)} answers are the letter of a choice and "
            f"grading.verifier is {verifier}",
            "set grading.verifier=multiple_choice",
        )
    ]


def _kinds_of_prompts(inputs: Inputs, key: str) -> list[PromptKind]:
    """Kinds of prompts that the problems of a file are asked with, where lengths are limited."""
    if key == "data.problems":
        return [PromptKind.student, PromptKind.teacher]
    beside_trainer = key == "data.validation_problems" and inputs.config.trainer.val_check_interval
    return [PromptKind.evaluation] if beside_trainer else []


def _missing_solutions(inputs: Inputs, prompts: Prompts) -> Iterator[Finding]:
    problems = inputs.problems["data.problems"]
    learnt = inputs.config.references.source is ReferenceSource.solution
    if not prompts.needs_solution and not learnt:
        return
    without = ids_without(problems, "solution")
    if prompts.needs_solution and without:
        yield error(
            "teacher.privileged_context",
            f"is {inputs.config.teacher.privileged_context.value}, the teacher's prompt shows the "
            f"solution, and {len(without)} of {len(problems)} problems have no solution "
            f"({', '.join(without[:3])})",
            "add the field `solution`, or set it to answer or none",
        )
    if learnt and without:
        yield error(
            "references.source",
            f"is solution and {len(without)} of {len(problems)} problems have none "
            f"({', '.join(without[:3])})",
            "add the field `solution`, or set references.source=teacher",
        )


def stored_inputs(inputs: Inputs) -> Iterator[Finding]:
    """Check the files of earlier work that are to be used: references, pass rates."""
    config = inputs.config
    if config.references.path is not None and not Path(config.references.path).is_file():
        yield error(
            "references.path",
            f"is {config.references.path!r}: no such file",
            "give a JSONL file with id and response, or set references.source=teacher",
        )
    problems = inputs.problems.get("data.problems")
    if config.weights.pass_rates is not None and problems is not None:
        try:
            path = Path(config.weights.pass_rates)
            PassRateTable.read(path, problems).check_estimator(config.weights, path)
        except PacedError as refusal:
            yield error("weights.pass_rates", str(refusal))


def run_directory(inputs: Inputs) -> Iterator[Finding]:
    """Check that every stage has steps, and that the directory is this run's or no run's."""
    config, run_dir = inputs.config, inputs.run_dir
    problems = inputs.problems.get("data.problems")
    try:
        schedule.stages(config.stages, config.trainer.max_steps)
    except PacedError as refusal:
        yield error("stages", str(refusal))
    try:
        newest_checkpoint(config, run_dir)
        if problems is not None and (run_dir / DATA_FILE).exists():
            check_data(run_dir, problems)
    except PacedError as refusal:
        yield error("exp_manager.name", str(refusal))


def disk(inputs: Inputs) -> Iterator[Finding]:
    """Check the disk's room for checkpoints, kept and being written, and for a teacher cache."""
    config, run_dir = inputs.config, inputs.run_dir
    if inputs.student is not None:
        params = config.exp_manager.checkpoint_callback_params
        saves = -(-config.trainer.max_steps // params.every_n_train_steps)
        kept = saves
        if params.save_top_k != -1:
            kept = min(params.save_top_k + params.save_best_k, saves)
        each = checkpoint_bytes(inputs.student, config.trainer.compute_precision)
        there = sum(
            path.stat().st_size
            for folder in checkpoint_files.checkpoints(run_dir)
            for path in folder.rglob("*")
            if path.is_file()
        )
        needed = each * (kept + 1) - there
        if (free := _free(run_dir)) < needed:
            yield error(
                "exp_manager.exp_dir",
                f"{free / GIB:.1f} GiB are free and checkpoints need {needed / GIB:.1f}: "
                f"{kept} kept and one being written, {each / GIB:.1f} GiB each",
                "free space, choose another disk, or lower "
                "exp_manager.checkpoint_callback_params.save_top_k",
            )
    problems = inputs.problems.get("data.problems")
    cached = config.teacher.placement is TeacherPlacement.cached
    folder = config.teacher.cache_dir or (str(run_dir) if cached else None)
    if folder is not None and problems is not None and inputs.teacher is not None:
        kind = SignalKind(config.teacher.top_k, config.loss.temperature, inputs.tokenizer_rows or 0)
        itemsize = config.trainer.compute_precision.itemsize
        token = kind.bytes_per_token(inputs.teacher.hidden_size, itemsize)
        needed = len(problems) * config.data.max_response_length * token
        if (free := _free(Path(folder))) < needed:
            yield warning(
                "teacher.cache_dir",
                f"{free / GIB:.1f} GiB are free and the cache may grow to {needed / GIB:.1f} "
                f"({len(problems)} responses of at most {config.data.max_response_length} tokens)",
                "free space, choose another disk, or set teacher.top_k to 64 or less",
            )


def checkpoint_bytes(shape: Architecture, precision: Precision) -> int:
    """Bytes of a checkpoint, all ranks together: weights, fp32 masters (in bf16), two moments."""
    return model_parameters(shape) * (2 + 4 + 8 if precision is Precision.bf16 else 4 + 8)


def _free(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
