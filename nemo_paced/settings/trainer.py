"""Settings ``trainer``, ``exp_manager`` and ``training``: the loop, its logs and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_paced.settings.checks import positive, require
from nemo_paced.settings.choices import PRECISIONS, Precision


@dataclass
class TrainerConfig:
    """NeMo's ``trainer`` block, as far as this trainer honours it."""

    num_nodes: int = 1  # nodes of the job; above 1, torchrun or srun starts the ranks
    devices: int = 1  # ranks on each node: GPUs, or processes of the CPU build
    accelerator: str = "auto"  # auto | gpu | cpu
    max_steps: int = 200  # optimizer steps of the whole run
    val_check_interval: int = 0  # optimizer steps between held-out validations; 0: never
    # Optimizer steps between entries in TensorBoard, W&B and MLflow, which also get each step with
    # a validation; metrics.jsonl has every step.
    log_every_n_steps: int = 1
    precision: str = "bf16"  # bf16 (also bf16-mixed, bf16-true) or fp32 (also 32, 32-true)
    gradient_clip_val: float = 1.0  # largest global norm of the gradient; 0: no clipping

    def __post_init__(self) -> None:
        positive("trainer", self, "num_nodes", "devices", "max_steps", "log_every_n_steps")
        for name in ("val_check_interval", "gradient_clip_val"):
            value = getattr(self, name)
            require(value >= 0, f"trainer.{name} is {value}: it must be 0 (off) or above")
        require(
            self.precision in PRECISIONS,
            f"trainer.precision is {self.precision!r}: choose of {', '.join(PRECISIONS)}",
        )
        require(
            self.accelerator in ("auto", "gpu", "cpu"),
            f"trainer.accelerator is {self.accelerator!r}: choose auto, gpu or cpu",
        )

    @property
    def compute_precision(self) -> Precision:
        return PRECISIONS[self.precision]


@dataclass
class CheckpointCallbackParams:
    """When checkpoints are written and which are kept: the keys of NeMo's that are honoured."""

    every_n_train_steps: int = 100  # steps between checkpoints; the last step always has one
    save_top_k: int = 3  # checkpoints kept, newest first; -1: all
    save_best_k: int = 0  # checkpoints kept beyond these, best by validation/accuracy
    async_save: bool = False  # write checkpoints in the background while training goes on
    # Write the optimizer's state so that a resumed run may have other tensor, pipeline or expert
    # ranks: each rank first gathers 12 bytes for each of its parameters in host memory. Without it
    # each rank writes its own part, and only the number of data-parallel ranks may change. The
    # model's weights are readable at any layout either way.
    fully_reshardable: bool = False

    def __post_init__(self) -> None:
        where = "exp_manager.checkpoint_callback_params"
        positive(where, self, "every_n_train_steps")
        require(
            self.save_top_k == -1 or self.save_top_k >= 1,
            f"{where}.save_top_k is {self.save_top_k}: it must be -1 (keep all) or at least 1, "
            "a run without a checkpoint cannot be resumed",
        )
        require(self.save_best_k >= 0, f"{where}.save_best_k is {self.save_best_k}: 0 or above")


@dataclass
class ExpManagerSettings:
    """NeMo's ``exp_manager`` block: the keys of ``ExpManagerConfig`` that this trainer honours.

    The others drive Lightning callbacks that this training loop never runs; setting one is refused.
    The run directory is ``exp_dir/name[/version]``.
    """

    exp_dir: str = "nemo_experiments"  # directory of the runs
    name: str = "paced"  # name of this run
    version: str | None = None  # version of the run: a folder below its name
    use_datetime_version: bool = False  # date and time of the start as the version
    resume_if_exists: bool = True  # false: a run directory with checkpoints is refused
    create_tensorboard_logger: bool = True  # log to TensorBoard, in RUN/logs
    # Log to W&B: needs the package wandb; a resumed run goes on in the same W&B run.
    create_wandb_logger: bool = False
    wandb_logger_kwargs: dict[str, Any] = field(default_factory=dict)  # arguments of wandb.init
    create_mlflow_logger: bool = False  # log to MLflow: needs the package mlflow
    # Arguments of Lightning's MLFlowLogger.
    mlflow_logger_kwargs: dict[str, Any] = field(default_factory=dict)
    checkpoint_callback_params: CheckpointCallbackParams = field(
        default_factory=CheckpointCallbackParams
    )


@dataclass
class TrainingConfig:
    """Guards of the training loop: skipped steps, loss spikes and timeouts."""

    max_skipped_steps: int = 5  # steps with NaN or Inf in loss or gradient before the run stops
    # A loss above this many times the median of the stage's last 50, and far above their spread, is
    # logged, and the problems of its batch stand in metrics.jsonl; 0: never.
    loss_spike_factor: float = 5.0
    collective_timeout_s: float = 1800.0  # seconds after which a collective counts as failed
    # Seconds of preflight's roll call: a rank that has not answered by then is named.
    rank_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        positive("training", self, "collective_timeout_s", "rank_timeout_s")
        require(
            self.loss_spike_factor == 0 or self.loss_spike_factor > 1,
            f"training.loss_spike_factor is {self.loss_spike_factor}: above 1, or 0 for never",
        )
        require(self.max_skipped_steps >= 0, "training.max_skipped_steps must be 0 or above")
