"""Composition of a validated configuration from a command line, as in NeMo's ``hydra_runner``.

``hydra_runner`` is ``hydra.main`` with a few settings and two arithmetic resolvers. These are made
here, since importing it from NeMo takes seven seconds of Lightning, torchmetrics and transformers.
Its resolver ``gpu_name`` is left out: the machine that composes need not have the GPU.

YAML files hold only differences: ``conf/default.yaml`` names the schema (the dataclasses of
``config.py``, whose defaults are the defaults) and every recipe starts from it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from nemo_paced.config import PacedConfig, to_dict
from nemo_paced.cpu import computes_bf16
from nemo_paced.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent
CONF = PACKAGE / "conf"
ASSETS = PACKAGE / "quickstart" / "assets"
# flags of hydra that a value follows
VALUE_FLAGS = (
    *("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    *("--cfg", "-c", "--package", "-p", "--info", "-i"),
)
# hydra writes no files, keeps the working directory, and leaves logging as the command set it up
OVERRIDES = (
    *("hydra.output_subdir=null", "hydra.run.dir=.", "hydra.mode=RUN"),
    *("hydra/job_logging=none", "hydra/hydra_logging=none"),
)
NEMO_HYDRA = "1.1"  # version_base; what hydra_runner, which names none, gets


class Parser(argparse.ArgumentParser):
    """Parser of a command's flags: a mistake raises ConfigError; ``cli.main`` shows ``--help``."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=command, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; see nemo-paced {self.prog} --help")


def with_config(arguments: list[str], action: Callable[[PacedConfig], None]) -> None:
    """Compose the configuration that ``arguments`` ask for and hand it to ``action``.

    Args:
        arguments: ``--config-name``, ``--config-path``, ``--cfg job`` and dotted overrides. With
            ``--cfg`` hydra prints the configuration and ``action`` is not called.

    Raises:
        ConfigError: an unknown key, a wrong type, an impossible combination, no such file.
    """
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import DictConfig

    _refuse_flags(arguments)
    _register_resolvers()
    ConfigStore.instance().store(name="schema", node=PacedConfig)
    composed: list[DictConfig] = []
    swept: list[Any] = []

    @hydra.main(config_path=str(CONF), config_name="default", version_base=NEMO_HYDRA)
    def take(cfg: DictConfig) -> None:
        composed.append(cfg)
        swept.append(HydraConfig.get().sweeper.get("params"))

    messages = io.StringIO()
    saved = sys.argv
    search_path = f"hydra.searchpath=[file://{CONF}]"
    sys.argv = [saved[0], *_flags_first(arguments), search_path, *OVERRIDES]
    try:
        with redirect_stderr(messages):
            take()
    except SystemExit as stop:
        if stop.code not in (0, None):
            raise ConfigError(_explain(messages.getvalue())) from None
    finally:
        sys.argv = saved
        HydraConfig.instance().cfg = None  # NeMo's exp_manager compares its folder with ours
    if any(swept):
        raise _no_sweep("hydra.sweeper.params")
    if composed:
        action(to_config(composed[0]))


def _refuse_flags(arguments: Sequence[str]) -> None:
    """Refuse flags of hydra that do something else than compose; argparse takes any prefix.

    Raises:
        ConfigError: names one, and what to do instead.
    """
    for argument in arguments:
        if argument.startswith("--e"):
            raise ConfigError("--experimental-rerun unpickles a file: give --config-path instead")
        bare = argument.lstrip("+")
        if argument == "-m" or (len(argument) > 2 and "--multirun".startswith(argument)):
            raise _no_sweep(argument)
        if bare.startswith(("hydra.mode=", "hydra.sweep", "hydra/sweeper")):
            raise _no_sweep(argument)


def _no_sweep(what: str) -> ConfigError:
    return ConfigError(
        f"{what}: sweeps are not run; start a run for each value, under a name of its own: "
        "for lr in 1e-4 3e-4; do nemo-paced ... model.optim.lr=$lr exp_manager.name=lr_$lr; done"
    )


def _flags_first(arguments: list[str]) -> list[str]:
    """The same arguments, flags with values first: argparse takes overrides in one place only."""
    groups = _groups(arguments)
    flags: list[str] = []
    overrides: list[str] = []
    takes_value = False
    for argument in arguments:
        if takes_value or argument.startswith("-"):
            flags.append(argument)
        else:
            overrides.append(_opened(argument, groups))
        takes_value = argument in VALUE_FLAGS
    return flags + overrides


def _groups(arguments: Sequence[str]) -> set[str]:
    """Names of the user's groups of YAML files, which ``+GROUP=FILE`` adds; ours are there."""
    folders = []
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=False):
        name, equals, given = flag.partition("=")
        if name in ("--config-path", "-cp", "--config-dir", "-cd"):
            folders.append(Path(given if equals else value))
    found = {path.name for folder in folders if folder.is_dir() for path in folder.iterdir()}
    return found - {path.name for path in CONF.iterdir()}


def _opened(override: str, groups: set[str]) -> str:
    """The override without ``+`` and ``++``, which would add any key to the schema's in silence.

    A key may be added to a setting that is a dictionary of the user's keys, and a group of files.
    """
    bare = override.lstrip("+")
    key = bare.partition("=")[0]
    blocks = {key, *(key[:end] for end, letter in enumerate(key) if letter == ".")}
    if blocks & dictionaries():
        return f"++{bare}"
    group = re.split(r"[@/]", key)[0]
    return override if group in groups or key.startswith("hydra.") else bare


@cache
def dictionaries() -> frozenset[str]:
    """Dotted keys of the settings whose keys are the user's."""

    def search(block: Any, prefix: str) -> Iterator[str]:
        for f in dataclasses.fields(block):
            value = getattr(block, f.name)
            if isinstance(value, dict):
                yield prefix + f.name
            elif dataclasses.is_dataclass(value):
                yield from search(value, f"{prefix}{f.name}.")

    return frozenset(search(PacedConfig(), ""))


def to_config(cfg: Any) -> PacedConfig:
    """Dataclasses from a composed or loaded configuration, checked against the schema.

    Raises:
        ConfigError: an unknown key, a wrong type, an impossible combination.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged = OmegaConf.merge(OmegaConf.structured(PacedConfig), cfg)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        cause = error.__cause__
        if isinstance(cause, ConfigError):
            raise cause from None
        raise ConfigError(_explain(str(error))) from error


def recipe_arguments(
    known: argparse.Namespace, run_dir: Path | None, *, without: Sequence[str] = ()
) -> list[str]:
    """Arguments that select the recipe asked for, else the configuration of the run looked at.

    A model is asked with the prompts it was trained with: with another template, the change of
    template would be measured too.

    Args:
        known: parsed ``--config-path``, ``--config-name`` and, where the command has it, ``--cfg``.
        run_dir: the run that the model lies in; ``None``: none.
        without: keys whose lists in the run's configuration are emptied (its servers are gone).
    """
    given: list[str] = []
    for flag in ("config_path", "config_name", "cfg"):
        if value := getattr(known, flag, None):
            given += [f"--{flag.replace('_', '-')}", value]
    if run_dir is None or known.config_name or known.config_path:
        return given
    own = ["--config-path", str(run_dir), "--config-name", "config"]
    return [*given, *own, *(f"{key}=[]" for key in without)]


def load_config(path: Path) -> PacedConfig:
    """Read a resolved configuration that was saved with a run.

    Raises:
        ConfigError: it does not fit the schema.
    """
    from omegaconf import OmegaConf

    return to_config(OmegaConf.load(path))


def run_directory(config: PacedConfig) -> Path:
    """The run directory, ``exp_dir/name[/version]``, as an absolute path."""
    settings = config.exp_manager
    version = settings.version
    if version is None and settings.use_datetime_version:
        version = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    parts = [settings.exp_dir, settings.name, *([version] if version else [])]
    return Path(*parts).absolute()


def _register_resolvers() -> None:
    """Register the package's resolvers and NeMo's arithmetic.

    ``${paced.assets:NAME}`` is a path inside the package, ``${paced.cpu_precision:}`` the precision
    in which this machine's CPU is fast: bf16 or fp32.
    """
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("paced.assets", lambda n: str(ASSETS / n), replace=True)
    precision = "bf16" if computes_bf16() else "fp32"
    OmegaConf.register_new_resolver("paced.cpu_precision", lambda: precision, replace=True)
    OmegaConf.register_new_resolver("multiply", lambda x, y: x * y, replace=True)
    OmegaConf.register_new_resolver("sum", lambda x, y: x + y, replace=True)


def _explain(message: str) -> str:
    """Hydra's and omegaconf's message without its advice for developers, with the nearest key."""
    skip = ("Set the environment variable HYDRA_FULL_ERROR", "To append to your config use")
    lines = [line.strip() for line in message.splitlines()]
    lines = [line for line in lines if line and not line.startswith((*skip, "object_type="))]
    text = "; ".join(lines) or "the configuration could not be read"
    if "override_grammar" in text:
        text += """. A value with braces, commas or = needs quotes within quotes: 'KEY="VALUE"'"""
    if "ExpManagerSettings" in text:
        text += ". NeMo's other exp_manager keys drive Lightning callbacks that are never run here"
    keys = dotted_keys(to_dict(PacedConfig()))
    for word in _quoted(text):
        if "." in word and word not in keys and (near := _nearest(word, keys)):
            return f"{text}. Did you mean {near[0]!r}?"
    return text


def _nearest(word: str, keys: list[str]) -> list[str]:
    """At most one key: of the same name in another block, else one that is spelt alike."""
    name = word.rpartition(".")[2]
    namesakes = [key for key in keys if key.rpartition(".")[2] == name]
    return difflib.get_close_matches(word, namesakes or keys, n=1, cutoff=0 if namesakes else 0.6)


def _quoted(text: str) -> list[str]:
    return text.split("'")[1::2]


def dotted_keys(tree: Any, prefix: str = "") -> list[str]:
    """Dotted keys of every setting and block in a configuration given as nested dictionaries."""
    keys: list[str] = []
    for key, value in tree.items() if isinstance(tree, dict) else ():
        keys += [prefix + key, *dotted_keys(value, f"{prefix}{key}.")]
    return keys
