"""Prompts and responses of problems as token ids: the one place where a problem becomes tokens.

The same prompt, stop tokens and token limit are used for sampling, grading and the loss. Response
ids end with a stop token unless the response was cut at its limit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from enum import StrEnum
from functools import cached_property, lru_cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from nemo_paced.config import DataConfig, EvaluationConfig, PrivilegedContext
from nemo_paced.data import chat, watched_text
from nemo_paced.data.chat import ChatTemplate, Thoughts, opens_thought
from nemo_paced.errors import ConfigError
from nemo_paced.files import digest, file_digest
from nemo_paced.hf.tokenizer import load_tokenizer, stop_token_ids, tokenizer_digest
from nemo_paced.records import Problem
from nemo_paced.settings import template
from nemo_paced.settings.data import DATE

REMEMBERED = 1024  # prompts: a step asks for each more than once
BATCH = 1024  # prompts that are tokenised at once
NFC_GROWS = 3  # at most so many times, in UTF-8 (Unicode Standard Annex 15)


class PromptKind(StrEnum):
    """Whose prompt of a problem."""

    student = "student"  # sampled and trained with
    teacher = "teacher"  # with the privileged context
    evaluation = "evaluation"  # the student's, in the chat of the ``evaluation`` block


class ChatSettings(NamedTuple):
    """What a kind of prompts asks of the chat template, and the settings that say so."""

    system_key: str
    system: str
    variables_key: str
    variables: dict[str, Any]


def chat_settings(kind: PromptKind, data: DataConfig, evaluation: EvaluationConfig) -> ChatSettings:
    """The chat settings of a kind: its own where it has them, else the student's."""
    system: tuple[str, str | None] = "data.system_prompt", data.system_prompt
    variables_key = "data.chat_template_kwargs"
    own_system, own_variables = {
        PromptKind.student: (None, {}),
        PromptKind.teacher: (data.teacher_system_prompt, data.teacher_chat_template_kwargs),
        PromptKind.evaluation: (evaluation.system_prompt, evaluation.chat_template_kwargs),
    }[kind]
    prefix = "evaluation." if kind is PromptKind.evaluation else f"data.{kind.value}_"
    if own_system is not None:
        system = f"{prefix}system_prompt", own_system
    if own_variables:
        variables_key = f"{prefix}chat_template_kwargs"
    variables = {**data.chat_template_kwargs, **own_variables}
    given = {name: value for name, value in variables.items() if value is not None}
    return ChatSettings(system[0], system[1] or "", variables_key, given)


class Prompts:
    """Prompts of problems as token ids, by kind.

    Args:
        student_dir: Hugging Face directory whose tokenizer, chat template and stop tokens are used.
        data: prompt templates, chat and length limits.
        privileged_context: what the teacher's prompt holds beyond the student's.
        evaluation: the chat of evaluated problems; ``None``: the student's.

    Raises:
        ConfigError: there is no tokenizer.
    """

    def __init__(
        self,
        student_dir: str | Path,
        data: DataConfig,
        privileged_context: PrivilegedContext,
        evaluation: EvaluationConfig | None = None,
    ) -> None:
        self.student_dir = Path(student_dir)
        self.data = data
        self.privileged_context = privileged_context
        self.evaluation = evaluation or EvaluationConfig()
        self.tokenizer = load_tokenizer(student_dir)
        self._frames: dict[PromptKind, Callable[[str], str]] = {}
        # by the text itself: an id names a row of its own file, and nothing beyond
        self._encode = lru_cache(REMEMBERED)(self._encode_anew)

    def student(self, problem: Problem) -> tuple[int, ...]:
        """Prompt ids that the student is sampled and trained with.

        Raises:
            ConfigError: see :meth:`of`.
        """
        return self.of(problem, PromptKind.student)

    def teacher(self, problem: Problem) -> tuple[int, ...]:
        """Prompt ids of the teacher, with its privileged context.

        Raises:
            ConfigError: see :meth:`of`.
        """
        return self.of(problem, PromptKind.teacher)

    def of(self, problem: Problem, kind: PromptKind) -> tuple[int, ...]:
        """Prompt ids of one kind.

        Raises:
            ConfigError: the chat template cannot do what is asked of it, the problem lacks the
                teacher's context, or the prompt is longer than trained ones may be.
        """
        ids = self.encoded(problem, kind)
        key, limit = self.limit(kind)
        if kind is not PromptKind.evaluation and len(ids) > limit:
            raise ConfigError(
                f"the {kind.value} prompt of problem {problem.id!r} has {len(ids)} tokens, above "
                f"{key} {limit}: raise it or remove the problem"
            )
        return ids

    def encoded(self, problem: Problem, kind: PromptKind) -> tuple[int, ...]:
        """Prompt ids of one kind, whatever their number.

        Raises:
            ConfigError: see :meth:`text`.
        """
        return self._encode(self.text(problem, kind))

    def lengths(
        self,
        problems: Sequence[Problem],
        kind: PromptKind,
        progress: Callable[[int], None] | None = None,
    ) -> list[int]:
        """Tokens of each problem's prompt.

        Args:
            progress: called with the number of prompts that are done.

        Raises:
            ConfigError: see :meth:`text`.
        """
        found: list[int] = []
        for batch in _batches(problems):
            texts = [self.text(problem, kind) for problem in batch]
            found += self._counts(texts, special=not self.has_chat)
            if progress:
                progress(len(found))
        return found

    def above(
        self,
        problems: Sequence[Problem],
        kind: PromptKind,
        limit: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[tuple[str, int]]:
        """Id and tokens of each prompt of more than ``limit`` tokens, the longest first.

        Prompts of fewer bytes are not tokenised where a token has at least one.

        Args:
            progress: called with the number of prompts that are done.

        Raises:
            ConfigError: see :meth:`text`.
        """
        found: list[tuple[str, int]] = []
        done = 0
        for batch in _batches(problems):
            texts = [(problem.id, self.text(problem, kind)) for problem in batch]
            asked = [(i, text) for i, text in texts if not self._is_within(text, limit)]
            counts = self._counts([text for _, text in asked], special=not self.has_chat)
            found += [(i, n) for (i, _), n in zip(asked, counts, strict=True) if n > limit]
            done += len(batch)
            if progress:
                progress(done)
        return sorted(found, key=lambda each: -each[1])

    def tokens(self, texts: list[str]) -> list[int]:
        """Number of tokens of each text, without special ones."""
        return self._counts(texts, special=False)

    def text(self, problem: Problem, kind: PromptKind) -> str:
        """The whole prompt as text, with the chat template's special tokens.

        Raises:
            ConfigError: the chat template cannot do what is asked of it, or the problem lacks the
                teacher's context.
        """
        return self._frame(kind)(self._filled(problem, kind))

    def chat(self, kind: PromptKind) -> ChatTemplate:
        """The chat template with the settings of a kind.

        Raises:
            ConfigError: the tokenizer has none, or it cannot do what is asked of it.
        """
        if not self.tokenizer.chat_template:
            raise ConfigError(f"the tokenizer of {self.student_dir} has no chat template")
        settings = chat_settings(kind, self.data, self.evaluation)
        return ChatTemplate(
            self.tokenizer,
            system=settings.system,
            variables=settings.variables,
            today=date.fromisoformat(self.data.chat_template_date or DATE),
            keys=(settings.system_key, settings.variables_key),
        )

    def with_chats(self) -> Prompts:
        """The same prompts, after checking the chat of every kind.

        Raises:
            ConfigError: the chat template cannot do what is asked of it.
        """
        for kind in PromptKind:
            self._frame(kind)
        return self

    def check(
        self,
        problems: Sequence[Problem],
        kind: PromptKind,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Refuse problems whose prompts are longer than a server beside the trainer takes.

        Args:
            progress: called with the number of prompts that are done.

        Raises:
            ConfigError: counts them and names the longest; or see :meth:`text`.
        """
        above = self.above(problems, kind, self.limit(kind)[1], progress)
        self.refuse(above, kind, of=len(problems))

    def refuse(self, above: Sequence[tuple[str, int]], kind: PromptKind, *, of: int) -> None:
        """Refuse prompts that :meth:`above` found to be too long.

        Args:
            of: number of all prompts.

        Raises:
            ConfigError: counts them and names the longest, unless there is none.
        """
        if not above:
            return
        key, limit = self.limit(kind)
        named = ", ".join(f"{name!r} has {length} tokens" for name, length in above[:3])
        raise ConfigError(
            f"{len(above)} of {of} {kind.value} prompts are above {key} {limit}: "
            f"problem {named}{', ...' if len(above) > 3 else ''}; raise it to "
            f"{above[0][1]}, or remove the problems"
        )

    def identity(self, kind: PromptKind) -> str:
        """A digest of all that the prompts of a kind are made with, besides the problems.

        Raises:
            ConfigError: see :meth:`text`.
        """
        said = chat_settings(kind, self.data, self.evaluation) if self.has_chat else None
        return digest(
            [
                kind.value,
                tokenizer_digest(self.student_dir),
                [file_digest(str(module.__file__)) for module in _MAKERS],
                [version(name) for name in ("transformers", "tokenizers", "jinja2")],
                self.data.use_chat_template,
                self.data.chat_template_date,
                [] if said is None else [said.system, said.variables],
                self.data.prompt_template,
                self.data.teacher_prompt_template,
                self.privileged_context.value,
                *self.limit(kind),
            ]
        )

    @cached_property
    def thoughts(self) -> Thoughts:
        """What finds the thoughts of the student's responses."""
        return Thoughts(self.tokenizer, opened=self.opens_thought)

    @property
    def opens_thought(self) -> bool:
        """Whether the student's chat template begins a response inside a thought."""
        return self.has_chat and opens_thought(self._frame(PromptKind.student)("?"))

    @property
    def written_before_response(self) -> str:
        """What the chat template would write before a response that is given as text."""
        frame = self._frame(PromptKind.student)
        found = frame.written_before_response() if isinstance(frame, ChatTemplate) else None
        return found or ""

    @property
    def needs_solution(self) -> bool:
        """Whether the teacher's prompt shows the problem's expert solution."""
        if self.privileged_context is PrivilegedContext.none:
            return False
        used = template.fields(self.data.teacher_prompt_template)
        context = self.privileged_context is PrivilegedContext.expert_solution
        return "solution" in used or (context and "context" in used)

    @property
    def has_chat(self) -> bool:
        """Whether prompts go through a chat template."""
        return self.data.use_chat_template and bool(self.tokenizer.chat_template)

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids of tokens that end a response.

        The chat template's end of turn and those of :func:`nemo_paced.hf.tokenizer.stop_token_ids`:
        a base model's own differs from its chat template's, and it may sample either.
        """
        return stop_token_ids(self.tokenizer, self.student_dir, end_of_turn=self._end_of_turn)

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a response given as text, such as an expert solution.

        The one that the chat template ends turns with, where there is one.
        """
        if self._end_of_turn is not None:
            return self._end_of_turn
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

    def limit(self, kind: PromptKind) -> tuple[str, int]:
        """Setting that limits a kind of prompts, and its value."""
        name = "max_teacher_prompt_length" if kind is PromptKind.teacher else "max_prompt_length"
        return f"data.{name}", getattr(self.data, name)

    def _filled(self, problem: Problem, kind: PromptKind) -> str:
        data, context = self.data, self.privileged_context
        student_prompt = template.fill(data.prompt_template, {"problem": problem.problem})
        if kind is not PromptKind.teacher or context is PrivilegedContext.none:
            return student_prompt
        values = {
            "problem": problem.problem,
            "answer": problem.answer,
            "student_prompt": student_prompt,
        }
        if self.needs_solution:
            values["solution"] = self._solution(problem)
        values["context"] = values.get("solution", problem.answer)
        if context is PrivilegedContext.answer:
            values["context"] = problem.answer
        return template.fill(data.teacher_prompt_template, values)

    def _solution(self, problem: Problem) -> str:
        if problem.solution is None:
            raise ConfigError(
                f"problem {problem.id!r} has no solution, and the teacher's prompt shows it "
                "(teacher.privileged_context expert_solution, or {solution} in "
                "data.teacher_prompt_template): add the field `solution`, or set "
                "teacher.privileged_context to answer or none"
            )
        return problem.solution

    def _frame(self, kind: PromptKind) -> Callable[[str], str]:
        """What makes a prompt of a filled template: the chat template, checked once."""
        if kind not in self._frames:
            self._frames[kind] = self._new_frame(kind)
        return self._frames[kind]

    def _new_frame(self, kind: PromptKind) -> Callable[[str], str]:
        if self.has_chat:
            return self.chat(kind)
        chat = chat_settings(kind, self.data, self.evaluation)
        for key, value in (
            (chat.system_key, chat.system),
            (chat.variables_key, chat.variables),
        ):
            if value:
                raise ConfigError(
                    f"{key} is {value!r} and the tokenizer of {self.student_dir} has no chat "
                    "template: it would be ignored; leave it out, or give the tokenizer one"
                )
        return str

    @cached_property
    def _end_of_turn(self) -> int | None:
        """Id of the token by which the chat template ends a response, if it does."""
        frame = self._frame(PromptKind.student)
        if not isinstance(frame, ChatTemplate):
            return None
        ids = self.tokenizer.encode(frame.after_response(), add_special_tokens=False)
        return next((i for i in ids if i in self.tokenizer.added_tokens_decoder), None)

    def _encode_anew(self, text: str) -> tuple[int, ...]:
        # a chat template has written the special tokens already
        return tuple(self.tokenizer.encode(text, add_special_tokens=not self.has_chat))

    def _counts(self, texts: list[str], *, special: bool) -> list[int]:
        """Tokens of each text, by the tokenizer's own threads where it has them.

        Args:
            special: whether the tokenizer puts special tokens around a text.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        # what a file asks for itself, transformers turns off at a call
        if backend is not None and backend.truncation is None and backend.padding is None:
            return list(map(len, backend.encode_batch_fast(texts, add_special_tokens=special)))
        return [len(self.tokenizer.encode(text, add_special_tokens=special)) for text in texts]

    def _is_within(self, text: str, limit: int) -> bool:
        """Whether a text is too short for more than ``limit`` tokens."""
        return self._bytes_bound is not None and self._bytes_bound(text) <= limit

    @cached_property
    def _bytes_bound(self) -> Callable[[str], int] | None:
        """An upper bound of a text's tokens by its bytes; ``None``: there is none.

        A token of byte-level BPE has at least one byte of the text. Normalisers may lengthen a
        text; the composing one leaves ASCII as it is.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or type(backend.model).__name__ != "BPE":
            return None
        normalizer, splits = type(backend.normalizer).__name__, str(backend.pre_tokenizer)
        lengthens = "add_prefix_space=True" in splits or "Metaspace(" in splits
        bytewise = "ByteLevel(" in splits and not lengthens
        if normalizer not in ("NoneType", "NFC") or not bytewise:
            return None
        added = len(self._encode_anew(""))  # by the post-processor

        def bound(text: str) -> int:
            if normalizer == "NFC" and not text.isascii():
                return NFC_GROWS * len(text.encode()) + added
            return len(text.encode()) + added

        return bound


# what another release may do otherwise
_MAKERS = (chat, watched_text, template, sys.modules[__name__])


def _batches(problems: Sequence[Problem]) -> Iterator[tuple[Problem, ...]]:
    each = iter(problems)
    while batch := tuple(islice(each, BATCH)):
        yield batch
