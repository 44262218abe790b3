"""The commands ``pass-rates`` and ``references``: what ``train`` needs before its first step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from nemo_paced.compose import run_directory, with_config
from nemo_paced.config import PacedConfig, ReferenceSource
from nemo_paced.run.config_file import save_config

logger = logging.getLogger(__name__)

SIMULATE_FLAG = "--simulate"


def pass_rates(arguments: list[str]) -> None:
    """The command ``pass-rates``, with a model or by simulation."""
    if SIMULATE_FLAG in arguments:
        from nemo_paced.commands.weights import simulate_pass_rates

        simulate_pass_rates([a for a in arguments if a != SIMULATE_FLAG])
        return
    from nemo_paced.training import prepare

    with_config(arguments, lambda config: _prepare(config, prepare.pass_rates))


def references(arguments: list[str]) -> None:
    """The command ``references``: one response of the teacher to every problem."""
    from nemo_paced.training.references import references as make

    def action(config: PacedConfig) -> None:
        teacher = config.references.source is ReferenceSource.teacher
        if not (teacher and config.needs_references):
            logger.info("references: no stage trains on responses of the teacher; none are sampled")
            return
        _prepare(config, make)

    with_config(arguments, action)


def _prepare(config: PacedConfig, make: Callable[[PacedConfig, Path], Path]) -> None:
    run_dir = run_directory(config)
    save_config(config, run_dir)
    logger.info("written: %s", make(config, run_dir))
