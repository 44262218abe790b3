"""The commands ``import-hf`` and ``export-hf``, on one rank or several."""

from __future__ import annotations

import tempfile
from pathlib import Path

from nemo_paced.compose import with_config
from nemo_paced.config import PacedConfig
from nemo_paced.errors import ConfigError
from nemo_paced.run.config_file import save_config


def import_hf(arguments: list[str]) -> None:
    """The command ``import-hf``: a Hugging Face directory becomes a Megatron checkpoint."""
    paths, overrides = _two_paths(arguments, "import-hf HF_DIR CHECKPOINT_DIR")
    with_config(overrides, lambda config: _convert("import-hf", config, *paths))


def export_hf(arguments: list[str]) -> None:
    """The command ``export-hf``: a checkpoint becomes a Hugging Face directory."""
    (source, out_dir), overrides = _two_paths(arguments, "export-hf CHECKPOINT_DIR HF_DIR")
    from nemo_paced.run.checkpoint_files import find_checkpoint

    checkpoint = find_checkpoint(source)
    with_config(overrides, lambda config: _convert("export-hf", config, checkpoint, out_dir))


def _convert(task: str, config: PacedConfig, *paths: Path) -> None:
    """Convert in this process where the layout is one rank, else on ranks of their own."""
    from nemo_paced.commands.launch import launch, run_task
    from nemo_paced.run.convert import check_ranks

    check_ranks(config)
    if config.world_size == 1:
        run_task(task, config, *paths)
        return
    with tempfile.TemporaryDirectory() as folder:
        config_file = save_config(config, Path(folder))
        launch(task, config, config_file, *(path.absolute() for path in paths))


def _two_paths(arguments: list[str], usage: str) -> tuple[tuple[Path, Path], list[str]]:
    paths = [a for a in arguments if "=" not in a and not a.startswith("--")]
    if len(paths) != 2:
        raise ConfigError(f"usage: nemo-paced {usage} [key=value ...]; {len(paths)} given")
    return (Path(paths[0]), Path(paths[1])), [a for a in arguments if a not in paths]
