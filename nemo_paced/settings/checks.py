"""How settings are checked, and written out as plain data."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any

from nemo_paced.errors import ConfigError


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def positive(section: str, obj: Any, *names: str) -> None:
    for name in names:
        value = getattr(obj, name)
        require(value > 0, f"{section}.{name} is {value}: it must be above 0")


def refuse_ignored(
    section: str, obj: Any, names: tuple[str, ...], because: str, remedy: str
) -> None:
    """Keys that mean nothing beside another one must be at their defaults."""
    for f in dataclasses.fields(obj):
        if f.name not in names:
            continue
        value = getattr(obj, f.name)
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        require(
            value == default,
            f"{section}.{f.name} is {to_dict(value)} and {because}: it would be ignored; "
            f"{remedy}, or leave it out",
        )


def to_dict(config: Any) -> Any:
    """The config as plain dicts, lists and strings (enums by value): for YAML and fingerprints."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Enum):
        return config.value
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    return config
