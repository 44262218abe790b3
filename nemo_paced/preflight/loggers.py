"""Preflight check of the packages that loggers need: no extra of this project brings them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from nemo_paced.preflight.findings import Finding, error
from nemo_paced.preflight.inputs import Inputs

# setting of exp_manager -> package
PACKAGES = {"create_wandb_logger": "wandb", "create_mlflow_logger": "mlflow"}


def logger_packages(inputs: Inputs) -> Iterator[Finding]:
    """Check that the loggers' packages are installed, long before a step is to be logged."""
    for setting, package in PACKAGES.items():
        if getattr(inputs.config.exp_manager, setting) and find_spec(package) is None:
            yield error(
                f"exp_manager.{setting}",
                f"is true and the package {package} is not installed",
                f"pip install {package}, or set it to false: metrics.jsonl has every metric",
            )
