"""The commands that take a configuration or a checkpoint, as functions of their arguments."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from nemo_paced.compose import run_directory, with_config
from nemo_paced.config import PacedConfig
from nemo_paced.errors import ConfigError
from nemo_paced.logs import launcher_rank

logger = logging.getLogger(__name__)


def train(arguments: list[str]) -> None:
    with_config(arguments, train_with)


def train_with(config: PacedConfig) -> None:
    """Check, save the configuration, start the ranks."""
    from nemo_paced.entry.launch import launch
    from nemo_paced.training.prepare import save_config

    run_dir = run_directory(config)
    if launcher_rank() == 0:  # under torchrun or srun every rank comes here
        preflight(config, run_dir)
        save_config(config, run_dir)
    launch("train", config, run_dir / "config.yaml", run_dir)
    logger.info("run directory: %s", run_dir)


def preflight(config: PacedConfig, run_dir: Path) -> None:
    """What can be refused before ranks or servers start.

    Raises:
        PacedError: inputs that do not fit, or a run directory of another run.
    """
    from nemo_paced.training import schedule
    from nemo_paced.training.driver import Driver
    from nemo_paced.training.loop import newest_checkpoint
    from nemo_paced.training.setup import check_layouts

    schedule.stages(config.stages, config.trainer.max_steps)
    run_dir.mkdir(parents=True, exist_ok=True)
    Driver(config, run_dir)
    check_layouts(config)
    newest_checkpoint(config, run_dir)


def pass_rates(arguments: list[str]) -> None:
    from nemo_paced.training import prepare

    with_config(arguments, lambda config: _prepare(config, prepare.pass_rates))


def references(arguments: list[str]) -> None:
    from nemo_paced.training import prepare

    with_config(arguments, lambda config: _prepare(config, prepare.references))


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
    from nemo_paced.training.convert import find_checkpoint

    checkpoint = find_checkpoint(source)
    if not overrides:  # composing would import NeMo
        _convert("export-hf", PacedConfig(), checkpoint, out_dir)
        return
    with_config(overrides, lambda config: _convert("export-hf", config, checkpoint, out_dir))


def _convert(task: str, config: PacedConfig, *paths: Path) -> None:
    """In this process where the layout is one rank, else on ranks of their own."""
    from tempfile import TemporaryDirectory

    from nemo_paced.entry.launch import launch, run_task
    from nemo_paced.training.convert import check_ranks
    from nemo_paced.training.prepare import save_config

    check_ranks(config)
    if config.world_size == 1:
        run_task(task, config, *paths)
        return
    with TemporaryDirectory() as folder:
        save_config(config, Path(folder))
        launch(task, config, Path(folder) / "config.yaml", *(path.absolute() for path in paths))


def _two_paths(arguments: list[str], usage: str) -> tuple[tuple[Path, Path], list[str]]:
    paths = [a for a in arguments if "=" not in a and not a.startswith("--")]
    if len(paths) != 2:
        raise ConfigError(f"usage: nemo-paced {usage} [key=value ...]; {len(paths)} given")
    return (Path(paths[0]), Path(paths[1])), [a for a in arguments if a not in paths]
