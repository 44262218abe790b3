"""How long responses may be: the paper's 30,000 tokens, or what the models' context leaves."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_paced.config import PacedConfig
from nemo_paced.errors import ConfigError
from nemo_paced.hf.directory import context_length
from nemo_paced.rollout.sampler import given_key
from nemo_paced.serving.client import PROBE_TIMEOUT_S, RolloutClient

logger = logging.getLogger(__name__)

AS_STARTED = (None, "default")  # vLLM's weight version before any is sent


@dataclass(frozen=True, slots=True)
class Limits:
    """The same for all models that are compared.

    Attributes:
        response: tokens of a response.
        response_from: the setting or the context that it comes from.
        lm_eval: tokens of a few-shot prompt with its answer.
        context: of a server of ours, tokens.
    """

    response: int
    response_from: str
    lm_eval: int
    context: int

    @staticmethod
    def of(
        config: PacedConfig, models: Mapping[str, Path], *, longest_prompt: int, lm_eval: bool
    ) -> Limits:
        """From the settings, and the shortest context among the models and running servers.

        Args:
            models: Hugging Face directory by label.
            longest_prompt: of the problems, tokens; 0 where none are sampled.
            lm_eval: whether its tasks are among what is evaluated.

        Raises:
            ConfigError: a context that the longest prompt fills.
        """
        narrowest, context = _narrowest(config, models)
        evaluation = config.evaluation
        setting, response = "evaluation.max_response_length", evaluation.max_response_length
        if response is None:
            setting, response = "data.max_response_length", config.data.max_response_length
        few_shot = evaluation.lm_eval.max_length
        if context is not None:
            few_shot = min(few_shot, context)
            left = _left(narrowest, context, longest_prompt)
            if longest_prompt and response > left:
                logger.warning(
                    "responses are limited to %d tokens: %s is %d tokens, and the longest prompt "
                    "has %d (%s asks for %d)",
                    left, narrowest, context, longest_prompt, setting, response,
                )  # fmt: skip
                setting, response = f"{narrowest}, {context}", left
        needed = [longest_prompt + response] if longest_prompt else []
        needed += [few_shot] if lm_eval else []
        return Limits(response, setting, few_shot, max(needed))


def _narrowest(config: PacedConfig, models: Mapping[str, Path]) -> tuple[str, int | None]:
    """The shortest context in words and in tokens; ``None`` where nothing says one."""
    contexts = {f"the context of the {label}": context_length(p) for label, p in models.items()}
    contexts |= {
        f"the context of {endpoint}": _served_context(endpoint, given_key(), models.values())
        for endpoint in config.rollout.endpoints
    }
    known = {name: length for name, length in contexts.items() if length is not None}
    return min(known.items(), key=lambda item: item[1], default=("", None))


def _left(whose: str, context: int, longest_prompt: int) -> int:
    """Tokens beside the longest prompt."""
    if context <= longest_prompt:
        raise ConfigError(
            f"{whose} is {context} tokens and the longest prompt has {longest_prompt}: nothing is "
            "left for a response"
        )
    return context - longest_prompt


def _served_context(endpoint: str, key: str, models: Iterable[Path]) -> int:
    """``--max-model-len`` of a running server, which is asked whether it serves the model."""
    control = RolloutClient([endpoint], key, request_timeout_s=PROBE_TIMEOUT_S).control
    card = control.models()[0][0]
    (version,) = control.weight_versions()
    root = Path(card.root or "")
    as_started = version in AS_STARTED
    for model in models:
        if root.resolve() != model.resolve() or not as_started:
            weights = f"{root}" if as_started else f"weights that it was sent ({version})"
            logger.warning(
                "%s serves %s; what it answers is put down to %s", endpoint, weights, model
            )
    assert card.max_model_len is not None, "vLLM says it of every model"
    return card.max_model_len
