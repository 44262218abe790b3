"""Settings ``data``, ``references`` and ``grading``: problems, their references and grading."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import date
from typing import Any

from nemo_paced.errors import ConfigError
from nemo_paced.settings import template
from nemo_paced.settings.checks import positive, require
from nemo_paced.settings.choices import (
    Duplicates,
    ReferenceSource,
    Unanswered,
    WrongReferences,
)

FIELDS = ("id", "problem", "answer", "solution", "group")  # of a problem file
DATE = "2024-07-26"  # see data.chat_template_date
# Arguments of a tokenizer's apply_chat_template that decide what is rendered: ours to give.
RESERVED = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "documents",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
)


@dataclass
class DataConfig:
    r"""Problem files (JSONL or Parquet: id, problem, answer, optional solution) and prompts.

    Templates are texts with fields in braces. The student's has ``{problem}``; the teacher's also
    ``{student_prompt}`` (the filled student prompt), ``{answer}``, ``{solution}`` and ``{context}``
    (what ``teacher.privileged_context`` names). Other braces are text, as in ``\boxed{}``; a word
    in braces is written ``{{word}}``.
    """

    problems: str = ""  # file of the training problems; or a pattern: data/train-*.parquet
    # File of held-out problems for trainer.val_check_interval and for `evaluate` (suite `heldout`).
    validation_problems: str | None = None
    # File of problems of older skills for `evaluate` (suite `forgetting`).
    forgetting_problems: str | None = None
    # Columns of files whose schema is not known, by field (id, problem, answer, solution, group):
    # {problem: query, answer: reward.gold}. An id of null numbers the rows. A file that has none of
    # these columns is read by its own.
    columns: dict[str, Any] = field(default_factory=dict)
    duplicates: Duplicates = Duplicates.refuse
    unanswered: Unanswered = Unanswered.refuse
    # The student's prompt, before the chat template; the default is DAPO's.
    prompt_template: str = (
        "Solve the following math problem step by step. The last line of your response should be "
        "of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
        '\n\n{problem}\n\nRemember to put your answer on its own line after "Answer:".'
    )
    # The teacher's prompt, where teacher.privileged_context is not `none`.
    teacher_prompt_template: str = (
        "Problem:\n{problem}\n\nA reference for your guidance:\n{context}\n\nUse it to answer in "
        "your own words, not verbatim.\n\n{student_prompt}"
    )
    use_chat_template: bool = True  # wrap both prompts in the tokenizer's chat template
    system_prompt: str | None = None  # system turn of the chat; None: what the template does itself
    # Variables of the chat template, as `enable_thinking: false` of Qwen3's; one that the template
    # does not read is refused.
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    # The teacher's, where it differs from the student's; "": no system turn.
    teacher_system_prompt: str | None = None
    # The teacher's own variables, over the student's; null leaves one out.
    teacher_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    # The date (YYYY-MM-DD) that is told by chat templates that tell one, so that prompts are the
    # same tomorrow; None: 2024-07-26, which Llama 3.1's template tells by itself.
    chat_template_date: str | None = None
    max_prompt_length: int = 1024  # most tokens of the student's prompt
    max_teacher_prompt_length: int = 3072  # most tokens of the teacher's prompt, context included
    max_response_length: int = 8192  # most tokens of a response, EOS included
    shuffle: bool = True  # shuffle the problems anew each epoch, by model.seed

    def __post_init__(self) -> None:
        positive(
            "data", self, "max_prompt_length", "max_teacher_prompt_length", "max_response_length"
        )
        self._check_templates()
        for name, column in self.columns.items():
            require(
                name in FIELDS,
                f"data.columns holds {name!r}, which is no field; choose of {', '.join(FIELDS)}",
            )
            require(
                isinstance(column, str) or (column is None and name == "id"),
                f"data.columns.{name} is {column!r}: give the name of a column",
            )
        check_chat(
            "data",
            self.use_chat_template,
            system_prompt=self.system_prompt,
            chat_template_kwargs=self.chat_template_kwargs,
            teacher_system_prompt=self.teacher_system_prompt,
            teacher_chat_template_kwargs=self.teacher_chat_template_kwargs,
        )
        try:
            date.fromisoformat(self.chat_template_date or DATE)
        except ValueError:
            raise ConfigError(
                f"data.chat_template_date is {self.chat_template_date!r}: give YYYY-MM-DD"
            ) from None

    def _check_templates(self) -> None:
        shown = {"problem": "", "student_prompt": "", "answer": "", "solution": "", "context": ""}
        template.check(
            "data.prompt_template", self.prompt_template, ["problem"], hidden=["answer", "solution"]
        )
        template.check("data.teacher_prompt_template", self.teacher_prompt_template, shown)
        for name, needed in (
            ("prompt_template", {"problem"}),
            ("teacher_prompt_template", {"problem", "student_prompt"}),
        ):
            require(
                bool(needed & template.fields(getattr(self, name))),
                f"data.{name} has no {{problem}} field: every prompt would be the same",
            )


def check_chat(section: str, use_chat_template: bool, **settings: Any) -> None:
    """Refuse settings of the chat template that would be ignored, or that are not the user's.

    Args:
        settings: by name in their section; ``None`` or empty: not set.

    Raises:
        ConfigError: names the setting.
    """
    for name, value in settings.items():
        require(
            use_chat_template or not value,
            f"{section}.{name} is {value!r} and data.use_chat_template is false: it would be "
            "ignored; leave it out, or write it into data.prompt_template",
        )
        for key in value if isinstance(value, dict) else ():
            require(
                key not in RESERVED,
                f"{section}.{name} holds {key!r}, which is decided here; leave it out",
            )


@dataclass
class ReferencesConfig:
    """Where the stored responses come from that stages with responses=references train along."""

    source: ReferenceSource = ReferenceSource.teacher
    path: str | None = None  # file of the references, with source=file
    # Running servers of the teacher (rollout-server --model teacher) instead of our own.
    endpoints: list[str] = field(default_factory=list)
    temperature: float = 1.0  # temperature at which the teacher samples
    top_p: float = 1.0  # nucleus of its sampling: 1 is the whole distribution
    # What becomes of a response whose answer is not the problem's.
    wrong: WrongReferences = WrongReferences.keep
    # Most samples of a problem, taken until one is right; with drop, the problem is dropped when
    # none is. None: 8 with resample, else 1.
    max_attempts: int | None = None

    def __post_init__(self) -> None:
        self._check_wrong()
        require(
            (self.source is ReferenceSource.file) == (self.path is not None),
            f"references.source is {self.source.value} and references.path is {self.path!r}: "
            "source=file needs a path, the other sources take none",
        )
        require(
            not self.endpoints or self.source is ReferenceSource.teacher,
            f"references.endpoints is set and references.source is {self.source.value}: no "
            "teacher is asked then; remove one of the two",
        )

    @property
    def attempts(self) -> int:
        """``max_attempts`` with its default resolved."""
        if self.max_attempts is not None:
            return self.max_attempts
        return 8 if self.wrong is WrongReferences.resample else 1

    def _check_wrong(self) -> None:
        wrong, attempts = self.wrong.value, self.attempts
        require(
            self.source is ReferenceSource.teacher
            or (self.wrong is WrongReferences.keep and self.max_attempts is None),
            f"references.wrong is {wrong}, references.max_attempts {self.max_attempts} and "
            f"references.source {self.source.value}: nothing is sampled or graded then; set "
            "references.source=teacher, or leave both out",
        )
        require(attempts > 0, f"references.max_attempts is {attempts}: it must be above 0")
        require(
            attempts == 1 or self.wrong is not WrongReferences.keep,
            f"references.max_attempts is {attempts} and references.wrong is keep: the first sample "
            "is kept and the others would never be asked for; set references.wrong=resample",
        )
        require(
            attempts > 1 or self.wrong is not WrongReferences.resample,
            "references.max_attempts is 1 and references.wrong is resample: no sample is left to "
            "try; raise the first, or set references.wrong=keep",
        )
        require(
            attempts == 1 or self.temperature > 0,
            f"references.temperature is 0 and references.max_attempts is {attempts}: every attempt "
            "would give the same response; raise the first, or set references.wrong to keep",
        )


@dataclass
class GradingConfig:
    """How a response is judged right or wrong: by its final answer."""

    # math (final answer, then math-verify) | exact | multiple_choice, or module:function of yours
    verifier: str = "math"
    time_limit_s: float = 5.0  # seconds an item; then its worker is killed and there is no verdict
    num_workers: int = 2  # worker processes of the verifier
    numeric_tolerance: float = 1e-6  # largest relative error, for numbers with a decimal point
    # Whether the last number (of choices: the last option named) counts where no answer is marked.
    # false, where the prompt asks for \boxed{} or the like: what is not marked is no answer.
    last_number: bool = True

    def __post_init__(self) -> None:
        positive("grading", self, "time_limit_s", "num_workers")
        require(
            0 <= self.numeric_tolerance < 1,
            f"grading.numeric_tolerance is {self.numeric_tolerance}: it must lie in [0, 1)",
        )
