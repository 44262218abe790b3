"""Preflight checks that student and teacher read, end and frame text by the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nemo_paced.config import PacedConfig, ReferenceSource
from nemo_paced.data.chat import SWITCHES, variables_of
from nemo_paced.data.prompts import Prompts
from nemo_paced.errors import ConfigError
from nemo_paced.hf.tokenizer import named_stop_ids
from nemo_paced.preflight.findings import Finding, error, warning
from nemo_paced.preflight.inputs import Inputs

REMEDY = "distillation matches token ids: choose a teacher of the student's family"


def token_ids(inputs: Inputs) -> Iterator[Finding]:
    """Check that each id is the same token to both models, and special to both or neither."""
    student, teacher = inputs.tokenizer, inputs.teacher_tokenizer
    if student is None or teacher is None or student is teacher:
        return
    ours, theirs = (
        {index: token for token, index in tokenizer.get_vocab().items()}
        for tokenizer in (student, teacher)
    )
    differing = sorted(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    if differing:
        first = differing[0]
        yield error(
            "tokenizers",
            f"{len(differing)} token ids differ; the lowest, token id {first}, means "
            f"{ours.get(first)!r} to the student and {theirs.get(first)!r} to the teacher",
            REMEDY,
        )
    special = set(student.all_special_ids) ^ set(teacher.all_special_ids)
    if special:
        names = ", ".join(repr(ours.get(i, theirs.get(i))) for i in sorted(special)[:5])
        yield warning(
            "tokenizers",
            f"{names} {'is' if len(special) == 1 else 'are'} special to one of the two models only",
            "check that both learned the token's use (Base and Instruct models differ here)",
        )


def end_of_text(inputs: Inputs) -> Iterator[Finding]:
    """Check that the student has stop tokens, and the teacher's among them.

    Responses of both models end with one of the student's.
    """
    if inputs.prompts is None or inputs.teacher_tokenizer is None:
        return
    generation_config = Path(inputs.config.student.hf_path) / "generation_config.json"
    try:
        ours = set(inputs.prompts.stop_token_ids)
        theirs = named_stop_ids(inputs.teacher_tokenizer, Path(inputs.config.teacher_hf_path))
    except ConfigError as refusal:
        yield error("student.hf_path", str(refusal))
        return
    if extra := theirs - ours:
        names = [inputs.teacher_tokenizer.convert_ids_to_tokens(i) for i in sorted(extra)]
        yield warning(
            "tokenizers",
            f"the teacher also ends with {', '.join(map(repr, names))}, which is no stop token of "
            "the student: its responses would run on past it",
            f"add {sorted(extra)} to eos_token_id in {generation_config}",
        )


def chat_templates(inputs: Inputs) -> Iterator[Finding]:
    """Check the chat templates: the student's frames the prompts of both models."""
    student, teacher = inputs.tokenizer, inputs.teacher_tokenizer
    if student is None or teacher is None or not inputs.config.data.use_chat_template:
        return
    if not student.chat_template:
        yield warning(
            "data.use_chat_template",
            "is true and the student's tokenizer has no chat template: prompts are plain text",
            "set it to false to say so, or add a chat template to the tokenizer",
        )
    elif student.chat_template != teacher.chat_template:
        yield warning(
            "data.use_chat_template",
            "student and teacher have different chat templates; both prompts are framed by the "
            "student's",
            "compare the two, or copy the teacher's chat_template to the student",
        )
    if inputs.prompts is not None and inputs.prompts.has_chat:
        yield from _thinking(inputs.config, inputs.prompts)


def _thinking(config: PacedConfig, prompts: Prompts) -> Iterator[Finding]:
    """Check that a template that can think is told whether to, and solutions stand outside."""
    switches = SWITCHES & variables_of(prompts.tokenizer)
    if open_ones := sorted(switches - config.data.chat_template_kwargs.keys()):
        yield warning(
            "data.chat_template_kwargs",
            f"does not say {open_ones[0]}, which the chat template reads: whether the student "
            "thinks is left to the template",
            f"set data.chat_template_kwargs.{open_ones[0]}",
        )
    solutions = config.needs_references and config.references.source is ReferenceSource.solution
    if solutions and prompts.opens_thought:
        yield warning(
            "references.source",
            "is solution and the chat template begins responses inside a thought: solutions would "
            "be learnt as thoughts that never end",
            "set data.chat_template_kwargs so that it does not, or references.source=teacher",
        )
    elif solutions and (missing := prompts.written_before_response.strip()):
        yield warning(
            "references.source",
            f"is solution, and the chat template writes {missing!r} before a response: solutions "
            "would be learnt without it",
            "set data.chat_template_kwargs so that it does not, or references.source=teacher",
        )
