"""TensorBoard, W&B and MLflow through NeMo's ``exp_manager``.

``exp_manager`` moves every file of its log directory into ``run_N/`` when a run is resumed, so it
gets a folder of its own, ``RUN/logs``, and our files beside it stay where they are.
"""

from __future__ import annotations

import io
import logging
import secrets
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from nemo_paced.config import PacedConfig, to_dict


class Loggers:
    """The loggers that ``exp_manager`` made."""

    def __init__(self, loggers: list[Any]) -> None:
        self._loggers = loggers

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        for each in self._loggers:
            each.log_metrics(values, step=step)

    def close(self, *, failed: bool) -> None:
        for each in self._loggers:
            each.finalize("failed" if failed else "success")


def open_loggers(config: PacedConfig, run_dir: Path) -> Loggers:
    """Let NeMo make the loggers that the ``exp_manager`` block asks for; rank 0 only."""
    settings = config.exp_manager
    if not (
        settings.create_tensorboard_logger
        or settings.create_wandb_logger
        or settings.create_mlflow_logger
    ):
        return Loggers([])
    with _quiet():
        from lightning.pytorch import Trainer
        from lightning.pytorch.plugins.environments import LightningEnvironment
        from nemo.utils.exp_manager import exp_manager

        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            plugins=[LightningEnvironment()],  # torchrun's variables are not about this object
        )
        exp_manager(trainer, exp_manager_block(config, run_dir))
    for each in trainer.loggers:
        each.log_hyperparams(to_dict(config))
    return Loggers(list(trainer.loggers))


def exp_manager_block(config: PacedConfig, run_dir: Path) -> dict[str, Any]:
    """NeMo's configuration block; what would drive Lightning callbacks is off."""
    settings = config.exp_manager
    block: dict[str, Any] = {
        "explicit_log_dir": str(run_dir / "logs"),
        "name": settings.name,
        "resume_if_exists": True,
        "resume_ignore_no_checkpoint": True,
        "create_tensorboard_logger": settings.create_tensorboard_logger,
        # or Lightning writes a scalar of its own, hp_metric, which nothing here measures
        "summary_writer_kwargs": {"default_hp_metric": False},
        "create_wandb_logger": settings.create_wandb_logger,
        "create_mlflow_logger": settings.create_mlflow_logger,
        "create_checkpoint_callback": False,
        "create_preemption_callback": False,
        "log_step_timing": False,
        "log_tflops_per_sec_per_gpu": False,
        "disable_validation_on_resume": False,
        "seconds_to_sleep": 0,
    }
    if settings.create_wandb_logger:
        block["wandb_logger_kwargs"] = {
            "name": settings.name,
            "id": _wandb_run_id(run_dir),
            "resume": "allow",
            **settings.wandb_logger_kwargs,
        }
    if settings.create_mlflow_logger:
        block["mlflow_logger_kwargs"] = settings.mlflow_logger_kwargs
    return block


def _wandb_run_id(run_dir: Path) -> str:
    """The id of the run in W&B, kept in ``run_dir``: a resumed run goes on under the same."""
    path = run_dir / "wandb_run_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()


class _quiet:
    """Context in which NeMo and Lightning are silent.

    They announce themselves and their whole schema; a run's log is for the run.
    """

    def __enter__(self) -> None:
        self._out, self._err = redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO())
        self._out.__enter__()
        self._err.__enter__()
        logging.disable(logging.WARNING)

    def __exit__(self, *error: Any) -> None:
        logging.disable(logging.NOTSET)
        self._err.__exit__(*error)
        self._out.__exit__(*error)
