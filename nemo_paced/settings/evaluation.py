"""Settings ``evaluation``: how held-out problems are sampled, and lm-eval's tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_paced.settings.checks import positive, require


@dataclass
class LmEvalConfig:
    """Tasks of EleutherAI's lm-eval on the same server; the defaults are the paper's for MMLU."""

    tasks: list[str] = field(default_factory=list)  # names of tasks or of groups: mmlu
    include_path: str | None = None  # directory with task files (YAML) of your own
    num_fewshot: int | None = 5  # examples in a prompt; None: what each task says
    # Most questions of each name in `tasks`, a fixed draw in proportion to its subtasks; None: all.
    limit: int | None = 2000
    apply_chat_template: bool = False  # wrap few-shot prompts in the model's chat template
    # Longest few-shot prompt and answer in tokens, where the model's context allows it. A longer
    # prompt loses its beginning; how many did is reported.
    max_length: int = 4096

    def __post_init__(self) -> None:
        positive("evaluation.lm_eval", self, "max_length")
        for name, least in (("num_fewshot", 0), ("limit", 1)):
            value = getattr(self, name)
            require(
                value is None or value >= least,
                f"evaluation.lm_eval.{name} is {value}: it must be at least {least}, or null",
            )


@dataclass
class EvaluationConfig:
    """Held-out accuracy: mean@k; the defaults are the paper's protocol."""

    samples: int = 8  # k: responses to each problem
    temperature: float = 0.6  # temperature at which the model samples
    top_p: float = 0.95  # nucleus of its sampling: 1 is the whole distribution
    # Most tokens of a response; fewer where the model's context leaves fewer. None:
    # data.max_response_length.
    max_response_length: int | None = 30_000
    # System turn of evaluated problems, where it differs from data.system_prompt; "": none.
    system_prompt: str | None = None
    # Variables of the chat template for them, over data.chat_template_kwargs; null leaves one out.
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    lm_eval: LmEvalConfig = field(default_factory=LmEvalConfig)

    def __post_init__(self) -> None:
        positive("evaluation", self, "samples", "temperature", "top_p")
        require(self.top_p <= 1, f"evaluation.top_p is {self.top_p}: it must be at most 1")
        length = self.max_response_length
        require(
            length is None or length > 0,
            f"evaluation.max_response_length is {length}: it must be above 0, or null",
        )
