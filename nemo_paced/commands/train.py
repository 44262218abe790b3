"""The command ``train``, and its ``--dry-run``."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from nemo_paced.commands.preflight import check_run_inputs, is_first_rank
from nemo_paced.compose import run_directory, with_config
from nemo_paced.config import PacedConfig
from nemo_paced.run.config_file import CONFIG_FILE, save_config

logger = logging.getLogger(__name__)

DRY_RUN_FLAG = "--dry-run"


def train(arguments: list[str]) -> None:
    """The command ``train``, and its dry run."""
    if DRY_RUN_FLAG in arguments:
        with_config([a for a in arguments if a != DRY_RUN_FLAG], dry_run)
        return
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


def train_with(config: PacedConfig) -> None:
    """Check the inputs, save the configuration, and start the ranks if steps are left to train."""
    from nemo_paced.commands.launch import join_launcher, launch
    from nemo_paced.run.checkpoint_files import steps_trained

    run_dir = run_directory(config)
    if is_first_rank(config):
        check_run_inputs(config, run_dir, notes=False)
        save_config(config, run_dir)
    trained = 0 if join_launcher() else steps_trained(config, run_dir)
    if trained >= config.trainer.max_steps:
        logger.info("%s is trained to step %d already", run_dir, trained)
        return
    launch("train", config, run_dir / CONFIG_FILE, run_dir)
    logger.info("run directory: %s", run_dir)
