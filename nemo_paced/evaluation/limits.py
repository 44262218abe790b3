"""How long evaluated responses may be: the paper's 30,000 tokens, or what the context leaves."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_paced.config import PacedConfig
from nemo_paced.errors import ConfigError
from nemo_paced.hf.directory import context_length
from nemo_paced.rollout.served import given_key
from nemo_paced.serving.client import PROBE_TIMEOUT_S, RolloutClient

logger = logging.getLogger(__name__)

AS_STARTED = (None, "default")  # weight versions of a server that was sent no weights


@dataclass(frozen=True, slots=True)
class Limits:
    """Length limits of an evaluation, the same for all models that are compared.

    Attributes:
        response: most tokens of a response.
        response_from: the setting or the context that ``response`` comes from.
        lm_eval: most tokens of a few-shot prompt with its answer.
        context: tokens of the longest sequence, for which a server of ours is started.
    """

    response: int
    response_from: str
    lm_eval: int
    context: int

    @staticmethod
    def of(
        config: PacedConfig, models: Mapping[str, Path], *, longest_prompt: int, lm_eval: bool
    ) -> Limits:
        """Limits from the settings and the shortest context of the models and running servers.

        Args:
            models: Hugging Face directory by label.
            longest_prompt: of the problems, tokens; 0 where none are sampled.
            lm_eval: whether tasks of lm-eval are among what is evaluated.

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
    """The shortest context: whose it is, and its tokens, ``None`` where none is known."""
    contexts = {f"the context of the {label}": context_length(p) for label, p in models.items()}
    contexts |= {
        f"the context of {endpoint}": _served_context(endpoint, given_key(), models.values())
        for endpoint in config.rollout.endpoints
    }
    known = {name: length for name, length in contexts.items() if length is not None}
    return min(known.items(), key=lambda item: item[1], default=("", None))


def _left(whose: str, context: int, longest_prompt: int) -> int:
    """Tokens that a context leaves beside the longest prompt.

    Raises:
        ConfigError: there are none.
    """
    if context <= longest_prompt:
        raise ConfigError(
            f"{whose} is {context} tokens and the longest prompt has {longest_prompt}: nothing is "
            "left for a response"
        )
    return context - longest_prompt


def _served_context(endpoint: str, key: str, models: Iterable[Path]) -> int:
    """``--max-model-len`` of a running server; warns where it serves other weights."""
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
