"""The preflight checks that one process makes; none of them reads a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nemo_paced.config import PacedConfig
from nemo_paced.preflight import files, loggers, models, servers, tokens
from nemo_paced.preflight.findings import Finding
from nemo_paced.preflight.inputs import Inputs

Check = Callable[[Inputs], Iterator[Finding]]

# all that `train --dry-run --full` checks: config.json is enough
OF_SHAPES: tuple[Check, ...] = (
    models.layouts,
    models.sequence_limits,
    models.batch,
    models.recompute,
)
# all that `train --dry-run` checks
OF_MODELS: tuple[Check, ...] = (*OF_SHAPES, models.vocabularies, models.gpu_memory)
CHECKS: tuple[Check, ...] = (
    *OF_MODELS,
    models.cpu_precision,
    tokens.token_ids,
    tokens.end_of_text,
    tokens.chat_templates,
    files.problem_prompts,
    files.answers,
    files.stored_inputs,
    files.run_directory,
    files.disk,
    loggers.logger_packages,
    servers.own_servers,
    servers.endpoints,
)


def check_inputs(
    config: PacedConfig, run_dir: Path, checks: Sequence[Check] = CHECKS, *, keeps: bool = False
) -> list[Finding]:
    """Findings of one process on models, tokenizers, files, disk and servers; takes seconds.

    What ranks have to find together is in ``ranks.py``.

    Args:
        keeps: whether what is read of problem files is kept in the run directory.
    """
    inputs = Inputs(config, run_dir, keeps=keeps)
    found = [finding for check in checks for finding in check(inputs)]
    return inputs.unreadable + found
