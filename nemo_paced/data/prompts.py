"""Prompts and responses of problems as token ids: the one place where a problem becomes tokens.

The same prompt, stop tokens and token limit are used for sampling, grading and the loss. Response
ids end with a stop token unless the response was cut at its limit.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from nemo_paced.config import DataConfig, PrivilegedContext
from nemo_paced.errors import ConfigError
from nemo_paced.hf.tokenizer import load_tokenizer, stop_token_ids
from nemo_paced.records import Problem


class Prompts:
    """Student and teacher prompts of problems, as token ids.

    Args:
        student_dir: Hugging Face directory whose tokenizer, chat template and stop tokens are used.
        data: prompt templates and length limits.
        privileged_context: what the teacher's prompt holds beyond the student's.
    """

    def __init__(
        self, student_dir: str | Path, data: DataConfig, privileged_context: PrivilegedContext
    ) -> None:
        self.student_dir = Path(student_dir)
        self.data = data
        self.privileged_context = privileged_context
        self.tokenizer = load_tokenizer(student_dir)
        self._cache: dict[tuple[str, bool], tuple[int, ...]] = {}

    def student(self, problem: Problem) -> tuple[int, ...]:
        """Prompt ids that the student is sampled and trained with.

        Raises:
            ConfigError: the prompt is longer than ``data.max_prompt_length``.
        """
        return self._ids(problem, teacher=False)

    def teacher(self, problem: Problem) -> tuple[int, ...]:
        """Prompt ids of the teacher, with its privileged context.

        Raises:
            ConfigError: the prompt is longer than ``data.max_teacher_prompt_length``, or the
                problem lacks the context.
        """
        return self._ids(problem, teacher=True)

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids of tokens that end a response, see :func:`nemo_paced.hf.tokenizer.stop_token_ids`."""
        return stop_token_ids(self.tokenizer, self.student_dir)

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a response given as text, such as an expert solution."""
        eos = self.tokenizer.eos_token_id
        return int(eos) if eos is not None else self.stop_token_ids[0]

    def response(self, text: str) -> tuple[int, ...]:
        """Ids of a response given as text: tokenised once, EOS appended, cut at its limit.

        The limit is ``data.max_response_length``.
        """
        ids = (*self.tokenizer.encode(text, add_special_tokens=False), self.eos_id)
        return ids[: self.data.max_response_length]

    def decode(self, ids: tuple[int, ...] | list[int]) -> str:
        """Text of token ids, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _ids(self, problem: Problem, *, teacher: bool) -> tuple[int, ...]:
        key = (problem.id, teacher)
        if key not in self._cache:
            ids = self._encode(self._text(problem, teacher=teacher))
            limit_key = "max_teacher_prompt_length" if teacher else "max_prompt_length"
            limit = getattr(self.data, limit_key)
            if len(ids) > limit:
                raise ConfigError(
                    f"the {'teacher' if teacher else 'student'} prompt of problem {problem.id!r} "
                    f"has {len(ids)} tokens, above data.{limit_key} {limit}: raise it or remove "
                    "the problem"
                )
            self._cache[key] = ids
        return self._cache[key]

    def _text(self, problem: Problem, *, teacher: bool) -> str:
        fields = {"problem": problem.problem}
        student_prompt = self.data.prompt_template.format(**fields)
        if not teacher or self.privileged_context is PrivilegedContext.none:
            return student_prompt
        return self.data.teacher_prompt_template.format(
            **fields, context=self._context(problem), student_prompt=student_prompt
        )

    def _context(self, problem: Problem) -> str:
        if self.privileged_context is PrivilegedContext.answer:
            return problem.answer
        if problem.solution is None:
            raise ConfigError(
                f"problem {problem.id!r} has no solution, and teacher.privileged_context is "
                "expert_solution: add the field `solution`, or set teacher.privileged_context to "
                "answer or none"
            )
        return problem.solution

    def _encode(self, text: str) -> tuple[int, ...]:
        if self.data.use_chat_template and self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            # the template has written the special tokens already
            return tuple(self.tokenizer.encode(text, add_special_tokens=False))
        return tuple(self.tokenizer.encode(text))
