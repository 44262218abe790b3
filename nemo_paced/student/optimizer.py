"""Which Adam runs inside Megatron's optimizers, and how its state gets through a checkpoint."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from nemo_paced.config import OptimBackend, OptimConfig
from nemo_paced.errors import ConfigError

logger = logging.getLogger(__name__)


def chained(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers inside Megatron's: one, or one for experts and one for the rest."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def use_backend(optimizer: MegatronOptimizer, optim: OptimConfig) -> None:
    """Put the Adam that ``model.optim.backend`` names into Megatron's optimizers and log its class.

    Megatron by itself, and so ``auto``, takes the first of Transformer Engine's, Apex's and torch's
    that can be imported.

    Raises:
        ConfigError: the named Adam is not installed.
    """
    for each in chained(optimizer):
        if each.optimizer is None:  # a rank without parameters of this kind
            continue
        if optim.backend is not OptimBackend.auto:
            wanted = _adam_class(optim)
            if not isinstance(each.optimizer, wanted):
                each.optimizer = _remade(each.optimizer, wanted, optim)
        made = type(each.optimizer)
        logger.info("optimizer: %s.%s", made.__module__, made.__qualname__)


def _adam_class(optim: OptimConfig) -> type[torch.optim.Optimizer]:
    decoupled = optim.name == "adamw"
    if optim.backend is OptimBackend.torch:
        return torch.optim.AdamW if decoupled else torch.optim.Adam
    module = {
        OptimBackend.transformer_engine: "transformer_engine.pytorch.optimizers",
        OptimBackend.apex: "apex.optimizers",
    }[optim.backend]
    try:
        return importlib.import_module(module).FusedAdam
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"model.optim.backend is {optim.backend.value} and {module}.FusedAdam cannot be "
            f"imported ({error}): install it, or set model.optim.backend=auto"
        ) from error


def _remade(
    made: torch.optim.Optimizer, wanted: type[torch.optim.Optimizer], optim: OptimConfig
) -> torch.optim.Optimizer:
    """Another Adam over the same parameter groups; no step has been taken yet."""
    options: dict[str, Any] = {
        "lr": optim.lr,
        "betas": tuple(optim.betas),
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
    }
    if optim.backend is not OptimBackend.torch:
        options["adam_w_mode"] = optim.name == "adamw"
    return wanted([dict(group) for group in made.param_groups], **options)


def make_moments(optimizer: MegatronOptimizer) -> None:
    """Give each torch Adam that has taken no step zero moments and a step count of 0.

    Megatron's distributed optimizer asks Adam for its step count, which torch's makes in its first
    step; Transformer Engine's and Apex's keep the count elsewhere.
    """
    for adam in _torch_adams(optimizer):
        for group in adam.param_groups:
            for parameter in group["params"]:
                if not adam.state[parameter]:
                    adam.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


@contextmanager
def steps_aside(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Context in which Megatron's distributed optimizer loads moments into torch's Adam by name.

    Megatron sets Adam's step count from the checkpoint first, then copies every other entry of a
    parameter's state, and stumbles over the count, which its own format leaves out. So the count is
    taken out of each state once it is set, and put back when the context ends.
    """
    taken: list[tuple[dict[str, Any], torch.Tensor]] = []

    def take(adam: torch.optim.Optimizer) -> None:
        taken.extend((state, state.pop("step")) for state in adam.state.values())

    with ExitStack() as stack:
        for adam in _torch_adams(optimizer):
            stack.callback(adam.register_load_state_dict_post_hook(take).remove)
        yield
    for state, step in taken:
        # the count comes as one tensor for all, and each parameter advances its own
        state["step"] = step.clone()


def _torch_adams(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    inner = [each.optimizer for each in chained(optimizer)]
    return [each for each in inner if isinstance(each, (torch.optim.Adam, torch.optim.AdamW))]
