"""``config.yaml`` of a run directory: the resolved configuration, beside what it made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_paced.config import PacedConfig, to_dict

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
PASS_RATES_FILE = "pass_rates.parquet"


def run_of(model: Path) -> Path | None:
    """The run directory that a model lies in, if any: RUN, RUN/hf or RUN/checkpoints/step_..."""
    for folder in (model, *model.parents[:2]):
        if (folder / CONFIG_FILE).exists() and (folder / METRICS_FILE).exists():
            return folder
    return None


def save_config(config: PacedConfig, run_dir: Path) -> Path:
    """Write ``config.yaml`` into a directory, made where it is missing; returns the file's path."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / CONFIG_FILE
    path.write_text(OmegaConf.to_yaml(to_dict(config)))
    return path


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The settings of a configuration as plain data by dotted key.

    Lists of blocks are indexed (``stages[0].name``), other lists are values.
    """
    if isinstance(tree, list) and any(isinstance(each, dict) for each in tree):
        inner = {f"{prefix}[{index}]": each for index, each in enumerate(tree)}
    elif isinstance(tree, dict) and tree:
        inner = {f"{prefix}.{key}" if prefix else str(key): each for key, each in tree.items()}
    else:
        return {prefix: tree}
    return {key: leaf for name, each in inner.items() for key, leaf in leaves(each, name).items()}
