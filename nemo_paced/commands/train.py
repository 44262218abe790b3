"""The command ``train``, and its ``--dry-run``, short or ``--full``."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from rich.console import Console

from nemo_paced.commands.preflight import check_run_inputs, is_first_rank
from nemo_paced.compose import run_directory, with_config
from nemo_paced.config import PacedConfig
from nemo_paced.errors import ConfigError
from nemo_paced.run.config_file import CONFIG_FILE, save_config

logger = logging.getLogger(__name__)

DRY_RUN_FLAG, FULL_FLAG = "--dry-run", "--full"


def train(arguments: list[str]) -> None:
    """The command ``train``, and its dry runs.

    Raises:
        ConfigError: ``--full`` without ``--dry-run``.
    """
    if DRY_RUN_FLAG in arguments:
        rest = [a for a in arguments if a not in (DRY_RUN_FLAG, FULL_FLAG)]
        with_config(rest, full_dry_run if FULL_FLAG in arguments else dry_run)
        return
    if FULL_FLAG in arguments:
        raise ConfigError(
            f"train: {FULL_FLAG} is a kind of dry run, and {DRY_RUN_FLAG} is not given: add it, or "
            f"leave {FULL_FLAG} out to train"
        )
    from nemo_paced.commands.launch import join_launcher
    from nemo_paced.training import stop

    # before libraries start threads, which could take the signal
    if join_launcher():
        stop.listen()
    else:
        stop.block_warning()
    with_config(arguments, train_with)


def dry_run(config: PacedConfig) -> None:
    """One step of the whole layout in this process, with models of few layers; writes nothing."""
    from nemo_paced.preflight.checks import OF_MODELS, check_inputs
    from nemo_paced.preflight.dry_run.short import dry_run as run
    from nemo_paced.preflight.findings import refuse

    refuse(check_inputs(config, run_directory(config), OF_MODELS))
    logging.getLogger("megatron").setLevel(logging.WARNING)  # at INFO it lists every parameter
    with tempfile.TemporaryDirectory() as folder:
        for done in run(config, Path(folder)):
            logger.info(
                "rank %d of %d (stage %d): %d layers, %.1f M parameters, %d problems, "
                "%.1f s, %.1f GiB at most",
                done.rank,
                config.world_size,
                done.stage,
                done.layers,
                done.parameters / 1e6,
                done.problems,
                done.seconds,
                done.peak_bytes / 2**30,
            )
    logger.info("dry run: groups, shapes and one step of every stage went through")


def full_dry_run(config: PacedConfig) -> None:
    """One step of the recipe at its full size on fake tensors, its memory beside the plan's."""
    from nemo_paced.preflight.checks import OF_SHAPES, check_inputs
    from nemo_paced.preflight.dry_run.full_size import TOLERANCE, full_run
    from nemo_paced.preflight.dry_run.full_size_report import memory_table
    from nemo_paced.preflight.findings import refuse

    refuse(check_inputs(config, run_directory(config), OF_SHAPES))
    logging.getLogger("megatron").setLevel(logging.WARNING)  # at INFO it lists every parameter
    console = Console()
    apart = 0
    for done in full_run(config):
        logger.info(
            "rank %d of %d (stage %d): %d layers, %d problems, %d operations in %.0f s",
            done.rank,
            config.world_size,
            done.stage,
            done.layers,
            done.problems,
            done.operations,
            done.seconds,
        )
        console.print(memory_table(done))
        apart += sum(not phase.agrees for phase in done.phases)
    if apart:
        logger.warning(
            "full dry run: %d of the peaks are more than %.0f %% from plan's: do not trust plan "
            "for this layout",
            apart,
            100 * TOLERANCE,
        )
    logger.info("full dry run: every shape of one step of every stage went through")


def train_with(config: PacedConfig) -> None:
    """Check the inputs, save the configuration, and start the ranks if steps are left to train."""
    from nemo_paced.commands.launch import join_launcher, launch
    from nemo_paced.run.checkpoint_files import steps_trained

    run_dir = run_directory(config)
    if is_first_rank(config):
        check_run_inputs(config, run_dir, dry=False)
        save_config(config, run_dir)
    trained = 0 if join_launcher() else steps_trained(config, run_dir)
    if trained >= config.trainer.max_steps:
        logger.info("%s is trained to step %d already", run_dir, trained)
        return
    launch("train", config, run_dir / CONFIG_FILE, run_dir)
    logger.info("run directory: %s", run_dir)
