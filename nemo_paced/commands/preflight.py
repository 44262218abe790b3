"""The commands ``preflight`` and ``data``: what would stop a run, and what it is made of."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from rich.console import Console

from nemo_paced.compose import Parser, recipe_arguments, run_directory, with_config
from nemo_paced.config import PacedConfig
from nemo_paced.errors import ConfigError
from nemo_paced.logs import launcher_rank
from nemo_paced.run.config_file import save_config

logger = logging.getLogger(__name__)


def preflight(arguments: list[str]) -> None:
    """The checks of ``train`` and nothing else: all findings at once, exit status 2 with errors."""

    def action(config: PacedConfig) -> None:
        from nemo_paced.commands.launch import launch

        if is_first_rank(config):
            check_run_inputs(config, run_directory(config), dry=True)
        with tempfile.TemporaryDirectory() as folder:  # a check leaves nothing behind
            launch("preflight", config, save_config(config, Path(folder)))
        logger.info("preflight: nothing that would stop the run was found")

    with_config(arguments, action)


def data(arguments: list[str]) -> None:
    """The command ``data``: what problem files hold, and what the models will see of them."""
    parser = Parser("data")
    parser.add_argument("file", nargs="?")
    parser.add_argument("--show", type=int, default=2)
    parser.add_argument("--evaluated", action="store_true")
    parser.add_argument("--config-name")
    parser.add_argument("--config-path")
    known, overrides = parser.parse_known_args(arguments)
    if known.file is not None and "=" in known.file and not Path(known.file).exists():
        known.file, overrides = None, [known.file, *overrides]

    def action(config: PacedConfig) -> None:
        from nemo_paced.preflight.problem_report import files_of, report

        key = "data.validation_problems" if known.evaluated else "data.problems"
        files = {key: known.file} if known.file else files_of(config)
        if not files:
            raise ConfigError("no file: name one, or a recipe with data.problems")
        refused = []
        for key, path in files.items():
            try:
                report(path, config, Console(), key=key, shown=known.show)
            except ConfigError as refusal:
                refused.append(str(refusal))
        if refused:
            raise ConfigError("; ".join(refused))

    with_config([*recipe_arguments(known, None), *overrides], action)


def is_first_rank(config: PacedConfig) -> bool:
    """Whether this process is the one that checks the inputs for all ranks.

    Under torchrun or srun every rank runs the command; rank 0 announces itself here.
    """
    from nemo_paced.commands.launch import join_launcher
    from nemo_paced.preflight.ranks import announce

    joined, first = join_launcher(), launcher_rank() == 0
    if joined and first:
        announce(config)  # the others wait for it then, however long it reads
    return first


def check_run_inputs(config: PacedConfig, run_dir: Path, *, dry: bool) -> None:
    """Make the checks that need one process, before ranks or servers start.

    Args:
        dry: show findings of severity ``note`` too, and keep nothing in the run directory.

    Raises:
        PreflightFailed: an error was found; all findings are on standard error.
    """
    from nemo_paced.preflight.checks import check_inputs
    from nemo_paced.preflight.findings import refuse

    refuse(check_inputs(config, run_dir, keeps=not dry), notes=dry)
