"""Stages and learning rate as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_paced.config import OptimConfig, StageConfig, WeightScheme, WeightsConfig
from nemo_paced.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage with the half-open range of optimizer steps it covers."""

    config: StageConfig
    first_step: int
    end_step: int


def stages(configs: Sequence[StageConfig], max_steps: int) -> list[Stage]:
    """Cut ``max_steps`` by the stages' fractions; the last one takes the rounding.

    Raises:
        ConfigError: a stage would be left with no step.
    """
    result: list[Stage] = []
    begin, share = 0, 0.0
    for index, config in enumerate(configs):
        share += config.fraction
        end = max_steps if index == len(configs) - 1 else round(share * max_steps)
        if end <= begin:
            raise ConfigError(
                f"stages[{config.name}].fraction is {config.fraction}, which leaves it no step of "
                f"trainer.max_steps {max_steps}: raise one of them"
            )
        result.append(Stage(config, begin, end))
        begin = end
    return result


def stage_at(all_stages: Sequence[Stage], step: int) -> Stage:
    """The stage that optimizer step ``step`` (counted from 0) belongs to."""
    for stage in all_stages:
        if stage.first_step <= step < stage.end_step:
            return stage
    raise AssertionError(f"step {step} lies outside the schedule")


def reestimation_due(weights: WeightsConfig, stage: Stage, step: int) -> bool:
    """Whether pass rates are sampled anew before optimizer step ``step``; step 0 has its own.

    They are not at a stage's first step with ``weights.scheme=unweighted``: no weight follows from
    hours of sampling. Who wants to watch them asks for ``weights.reestimate=every_n_steps``.
    """
    if step == 0:
        return False
    if step == stage.first_step and stage.config.reestimate_pass_rates:
        return weights.scheme is not WeightScheme.unweighted
    every = weights.reestimate_every_n_steps
    return every > 0 and step % every == 0


def learning_rate(optim: OptimConfig, step: int, max_steps: int) -> float:
    """Learning rate of optimizer step ``step``: linear warm-up, then NeMo's named decay."""
    sched = optim.sched
    if step < sched.warmup_steps:
        return optim.lr * (step + 1) / (sched.warmup_steps + 1)
    if sched.name == "constant":
        return optim.lr
    done = min(1.0, (step - sched.warmup_steps) / max(1, max_steps - sched.warmup_steps))
    left = 0.5 * (1 + math.cos(math.pi * done)) if sched.name == "CosineAnnealing" else 1 - done
    return sched.min_lr + (optim.lr - sched.min_lr) * left
