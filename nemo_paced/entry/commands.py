"""The commands that take a configuration or a checkpoint, as functions of their arguments."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

from nemo_paced.compose import run_directory, with_config
from nemo_paced.config import PacedConfig, ReferenceSource
from nemo_paced.errors import ConfigError
from nemo_paced.logs import launcher_rank

logger = logging.getLogger(__name__)


DRY_RUN_FLAG = "--dry-run"
SIMULATE_FLAG = "--simulate"


def train(arguments: list[str]) -> None:
    if DRY_RUN_FLAG in arguments:
        with_config([a for a in arguments if a != DRY_RUN_FLAG], dry_run)
        return
    from nemo_paced.entry.launch import join_launcher
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
    from nemo_paced.preflight.dry_run import dry_run as run
    from nemo_paced.preflight.findings import refuse

    refuse(check_inputs(config, run_directory(config), OF_MODELS))
    logging.getLogger("megatron").setLevel(logging.WARNING)  # every parameter by name
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
    """Check, save the configuration, start the ranks."""
    from nemo_paced.entry.launch import launch
    from nemo_paced.training.prepare import save_config

    run_dir = run_directory(config)
    if _is_first_rank(config):
        _check_inputs(config, run_dir, notes=False)
        save_config(config, run_dir)
    launch("train", config, run_dir / "config.yaml", run_dir)
    logger.info("run directory: %s", run_dir)


def preflight(arguments: list[str]) -> None:
    """The checks of ``train`` and nothing else: all findings at once, exit status 2 with errors."""

    def action(config: PacedConfig) -> None:
        from nemo_paced.entry.launch import launch
        from nemo_paced.training.prepare import save_config

        if _is_first_rank(config):
            _check_inputs(config, run_directory(config), notes=True)
        with tempfile.TemporaryDirectory() as folder:  # a check leaves nothing behind
            save_config(config, Path(folder))
            launch("preflight", config, Path(folder) / "config.yaml")
        logger.info("preflight: nothing that would stop the run was found")

    with_config(arguments, action)


def _is_first_rank(config: PacedConfig) -> bool:
    """Whether this process checks for all; under torchrun or srun every rank runs the command."""
    from nemo_paced.entry.launch import join_launcher
    from nemo_paced.preflight.ranks import announce

    joined, first = join_launcher(), launcher_rank() == 0
    if joined and first:
        announce(config)  # the others wait for it then, however long it reads
    return first


def _check_inputs(config: PacedConfig, run_dir: Path, *, notes: bool) -> None:
    """What one process can find before ranks or servers start.

    Raises:
        PreflightFailed: an error was found; all findings are on standard error.
    """
    from nemo_paced.preflight.checks import check_inputs
    from nemo_paced.preflight.findings import refuse

    refuse(check_inputs(config, run_dir), notes=notes)


def pass_rates(arguments: list[str]) -> None:
    if SIMULATE_FLAG in arguments:
        from nemo_paced.entry.weights import simulate_pass_rates

        simulate_pass_rates([a for a in arguments if a != SIMULATE_FLAG])
        return
    from nemo_paced.training import prepare

    with_config(arguments, lambda config: _prepare(config, prepare.pass_rates))


def references(arguments: list[str]) -> None:
    from nemo_paced.training.references import references as make

    def action(config: PacedConfig) -> None:
        teacher = config.references.source is ReferenceSource.teacher
        if not (teacher and config.needs_references):
            logger.info("references: no stage trains on responses of the teacher; none are sampled")
            return
        _prepare(config, make)

    with_config(arguments, action)


def _prepare(config: PacedConfig, make: Callable[[PacedConfig, Path], Path]) -> None:
    from nemo_paced.training.prepare import save_config

    run_dir = run_directory(config)
    save_config(config, run_dir)
    logger.info("written: %s", make(config, run_dir))


def import_hf(arguments: list[str]) -> None:
    paths, overrides = _two_paths(arguments, "import-hf HF_DIR CHECKPOINT_DIR")
    with_config(overrides, lambda config: _convert("import-hf", config, *paths))


def export_hf(arguments: list[str]) -> None:
    (source, out_dir), overrides = _two_paths(arguments, "export-hf CHECKPOINT_DIR HF_DIR")
    from nemo_paced.run.checkpoint_files import find_checkpoint

    checkpoint = find_checkpoint(source)
    with_config(overrides, lambda config: _convert("export-hf", config, checkpoint, out_dir))


def _convert(task: str, config: PacedConfig, *paths: Path) -> None:
    """In this process where the layout is one rank, else on ranks of their own."""
    from nemo_paced.entry.launch import launch, run_task
    from nemo_paced.run.convert import check_ranks
    from nemo_paced.training.prepare import save_config

    check_ranks(config)
    if config.world_size == 1:
        run_task(task, config, *paths)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_config(config, Path(folder))
        launch(task, config, Path(folder) / "config.yaml", *(path.absolute() for path in paths))


def _two_paths(arguments: list[str], usage: str) -> tuple[tuple[Path, Path], list[str]]:
    paths = [a for a in arguments if "=" not in a and not a.startswith("--")]
    if len(paths) != 2:
        raise ConfigError(f"usage: nemo-paced {usage} [key=value ...]; {len(paths)} given")
    return (Path(paths[0]), Path(paths[1])), [a for a in arguments if a not in paths]
