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


def use_backend(optimizer: MegatronOptimizer, optim: OptimConfig, device: torch.device) -> None:
    """Put the Adam that ``model.optim.backend`` names into Megatron's optimizers and log its class.

    Megatron by itself, and so ``auto``, takes the first of Transformer Engine's, Apex's and torch's
    that can be imported.

    Args:
        device: of the parameters.

    Raises:
        ConfigError: the named Adam is not installed, or does not run on this device.
    """
    if device.type == "cpu" and optim.backend not in (OptimBackend.auto, OptimBackend.torch):
        raise ConfigError(
            f"model.optim.backend is {optim.backend.value}, whose kernels need a GPU: set "
            "model.optim.backend=auto"
        )
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


def complete_state(optimizer: MegatronOptimizer) -> None:
    """Make what a checkpoint holds of each Adam: zero moments before its first step, and its count.

    The count of steps goes into every parameter group, where Transformer Engine's and Apex's Adam
    keep it. Torch's keeps one with each parameter, and Megatron looks there only where neither of
    the fused ones can be imported, whichever is in use.
    """
    for adam in _adams(optimizer):
        torchs = _is_torchs(adam)
        for group in adam.param_groups:
            for parameter in group["params"]:
                if not adam.state[parameter]:
                    adam.state[parameter] = {
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                        **({"step": torch.tensor(0.0)} if torchs else {}),
                    }
        if torchs:
            steps = {int(state["step"]) for state in adam.state.values()}
            assert len(steps) <= 1, f"one count for all parameters, not {steps}"
        else:
            steps = {group["step"] for group in adam.param_groups if "step" in group}
        for group in adam.param_groups:
            group["step"] = max(steps, default=0)


@contextmanager
def state_restored(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Context in which Megatron loads a checkpoint of what :func:`complete_state` made.

    The counts come out of the parameter groups, whose other entries stay those of this run: another
    class of Adam may have written the checkpoint, whose groups lack some of them. Torch's Adam asks
    for a count in each parameter's state, and Megatron's distributed optimizer for everything there
    in the checkpoint, which has none: it is there while the one loads and not for the other.
    """
    settings = [[dict(group) for group in adam.param_groups] for adam in _adams(optimizer)]

    def with_counts(adam: torch.optim.Optimizer, loaded: dict[str, Any]) -> None:
        for state in loaded["state"].values():
            state.setdefault("step", torch.tensor(0.0))

    def without_counts(adam: torch.optim.Optimizer) -> None:
        for state in adam.state.values():
            state.pop("step", None)

    with ExitStack() as stack:
        for adam in _adams(optimizer):
            if _is_torchs(adam):
                for hook in (
                    adam.register_load_state_dict_pre_hook(with_counts),
                    adam.register_load_state_dict_post_hook(without_counts),
                ):
                    stack.callback(hook.remove)
        yield
    for adam, own in zip(_adams(optimizer), settings, strict=True):
        for group, before in zip(adam.param_groups, own, strict=True):
            steps = int(group["step"])  # Megatron reads torch's as a float
            parameters = group["params"]
            group.clear()
            group.update(before, params=parameters, step=steps)
            if _is_torchs(adam):
                for parameter in parameters:
                    adam.state[parameter]["step"] = torch.tensor(float(steps))


def _adams(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    """Those that have parameters on this rank."""
    return [each.optimizer for each in chained(optimizer) if each.optimizer is not None]


def _is_torchs(adam: torch.optim.Optimizer) -> bool:
    return isinstance(adam, (torch.optim.Adam, torch.optim.AdamW))
