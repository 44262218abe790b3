"""Checks of settings, and settings as plain data."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any

from nemo_paced.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def positive(section: str, obj: Any, *names: str) -> None:
    """Raise ConfigError unless each of these fields of ``section`` is above 0."""
    for name in names:
        value = getattr(obj, name)
        require(value > 0, f"{section}.{name} is {value}: it must be above 0")


def refuse_ignored(
    section: str, obj: Any, names: tuple[str, ...], because: str, remedy: str
) -> None:
    """Raise ConfigError where a key that means nothing beside another one is not at its default.

    Args:
        because: what makes the keys meaningless, for the message.
        remedy: what to set instead, for the message.
    """
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
    """A config as plain dicts, lists and values (enums by value), for YAML and fingerprints."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Enum):
        return config.value
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    return config
