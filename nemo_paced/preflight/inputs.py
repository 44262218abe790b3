"""Inputs of the preflight checks, each read once; ``None`` where one cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from nemo_paced.config import PacedConfig
from nemo_paced.data.prompts import Prompts
from nemo_paced.errors import PacedError
from nemo_paced.hf.architectures import Architecture
from nemo_paced.hf.tokenizer import load_tokenizer
from nemo_paced.preflight.findings import Finding, error
from nemo_paced.run.problems import ProblemTable, RunProblems

T = TypeVar("T")

# settings of the block `data`
PROBLEM_FILES = ("problems", "validation_problems", "forgetting_problems")


class Inputs:
    """Models, tokenizers and problem files of a configuration.

    What cannot be read is a finding in ``unreadable``, once, and ``None`` (or left out) here; a
    check that needs it has nothing to say then.

    Args:
        keeps: whether what is read of problem files is kept in the run directory.
    """

    def __init__(self, config: PacedConfig, run_dir: Path, *, keeps: bool = False) -> None:
        self.config = config
        self.run_dir = run_dir
        self.kept = RunProblems(run_dir, writes=keeps)
        self.unreadable: list[Finding] = []

    @property
    def is_self_teacher(self) -> bool:
        return not self.config.teacher.hf_path

    @cached_property
    def student(self) -> Architecture | None:
        return self._architecture("student.hf_path", self.config.student.hf_path)

    @cached_property
    def teacher(self) -> Architecture | None:
        if self.is_self_teacher:
            return self.student
        return self._architecture("teacher.hf_path", self.config.teacher.hf_path)

    @cached_property
    def tokenizer(self) -> Any:
        """The student's tokenizer; ``None`` where it cannot be read."""
        return self._tokenizer("student.hf_path", self.config.student.hf_path)

    @cached_property
    def teacher_tokenizer(self) -> Any:
        if self.is_self_teacher:
            return self.tokenizer
        return self._tokenizer("teacher.hf_path", self.config.teacher.hf_path)

    @cached_property
    def tokenizer_rows(self) -> int | None:
        """Highest token id of the student's tokenizer, plus 1."""
        return None if self.tokenizer is None else max(self.tokenizer.get_vocab().values()) + 1

    @cached_property
    def prompts(self) -> Prompts | None:
        """Prompts of the run; ``None`` where its chat template cannot do what is asked of it."""
        if self.tokenizer is None:
            return None
        config, context = self.config, self.config.teacher.privileged_context
        prompts = Prompts(config.student.hf_path, config.data, context, config.evaluation)
        return self._read("student.hf_path", prompts.with_chats)

    @cached_property
    def problems(self) -> dict[str, ProblemTable]:
        """Problems by the setting that names their file, without files that cannot be read."""
        read = {}
        for name in PROBLEM_FILES:
            path = getattr(self.config.data, name)
            if path is None:
                continue
            key = f"data.{name}"
            read_file = partial(self.kept.read, path, key=key, data=self.config.data)
            problems = self._read(key, read_file)
            if problems is not None:
                read[key] = problems
        return read

    def _architecture(self, key: str, path: str) -> Architecture | None:
        if not path:
            self.unreadable.append(
                error(key, "is empty", "give the Hugging Face directory of the model")
            )
            return None
        return self._read(key, lambda: Architecture.read(path, key))

    def _tokenizer(self, key: str, path: str) -> Any:
        return self._read(key, lambda: load_tokenizer(path)) if path else None

    def _read(self, key: str, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except PacedError as refusal:
            self.unreadable.append(error(key, str(refusal)))
            return None
