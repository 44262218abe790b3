"""Settings ``model``: layout, batch sizes and optimizer of the student."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_paced.settings.checks import positive, require
from nemo_paced.settings.choices import OptimBackend, Recompute


@dataclass
class SchedConfig:
    """Schedule of the learning rate, with NeMo's names; steps are optimizer steps."""

    name: str = "constant"  # constant | CosineAnnealing | linear, over trainer.max_steps
    warmup_steps: int = 0  # steps in which the rate rises linearly to model.optim.lr
    min_lr: float = 0.0  # rate at which CosineAnnealing and linear end

    def __post_init__(self) -> None:
        require(
            self.name in ("constant", "CosineAnnealing", "linear"),
            f"model.optim.sched.name is {self.name!r}: choose constant, CosineAnnealing or linear",
        )
        require(
            self.warmup_steps >= 0, f"model.optim.sched.warmup_steps is {self.warmup_steps}: >= 0"
        )


@dataclass
class OptimConfig:
    """The optimizer; the defaults are the paper's (AdamW, constant 1e-7, decay 0.01)."""

    name: str = "adamw"  # adamw (decoupled decay) | adam
    lr: float = 1e-7  # highest learning rate of the schedule
    weight_decay: float = 0.01  # of all weights but norms and biases
    # Decay rates of the running averages of gradient and squared gradient.
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8  # added to the root of the second moment
    backend: OptimBackend = OptimBackend.auto
    # Moments and master weights are split over the data-parallel ranks.
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False  # reduce gradients while backward goes on
    overlap_param_gather: bool = False  # gather updated weights while forward goes on
    sched: SchedConfig = field(default_factory=SchedConfig)

    def __post_init__(self) -> None:
        require(
            self.name in ("adam", "adamw"),
            f"model.optim.name is {self.name!r}: choose adamw (decoupled decay) or adam",
        )
        positive("model.optim", self, "lr", "eps")
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            f"model.optim.betas is {self.betas}: two numbers in [0, 1) are needed",
        )
        require(
            not self.overlap_param_gather
            or (self.use_distributed_optimizer and self.overlap_grad_reduce),
            "model.optim.overlap_param_gather is true: it needs use_distributed_optimizer=true "
            "and overlap_grad_reduce=true as well",
        )
        require(
            self.sched.min_lr <= self.lr,
            f"model.optim.sched.min_lr is {self.sched.min_lr}, above model.optim.lr {self.lr}",
        )


@dataclass
class ModelConfig:
    """NeMo's ``model`` block: layout, batch sizes and optimizer of the student."""

    tensor_model_parallel_size: int = 1  # ranks that split each matrix and the vocabulary
    pipeline_model_parallel_size: int = 1  # pipeline stages that split the layers
    # Chunks of layers that each pipeline stage holds, interleaved: the more, the smaller the bubble
    # and the more messages. The teacher, which only runs forward, has one.
    virtual_pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1  # ranks that split each sequence
    expert_model_parallel_size: int = 1  # ranks that the experts of a layer lie on
    # Split the activations between matrices over the tensor-parallel ranks as well.
    sequence_parallel: bool = False
    # Factor of the router's load-balancing loss. 0 for distillation: the teacher says where the
    # student should go, and the balance that pre-training reached is kept.
    moe_aux_loss_coeff: float = 0.0
    micro_batch_size: int = 2  # sequences that a rank runs at once
    # Tokens of a row of packed sequences, which see nothing of each other; 0: each sequence is
    # padded to the longest. The teacher's rows hold at least its longest sequence.
    packed_sequence_size: int = 0
    global_batch_size: int = 32  # problems of an optimizer step
    # Rows of embedding and LM head are padded to a multiple of this x tensor-parallel ranks.
    make_vocab_size_divisible_by: int = 128
    recompute_granularity: Recompute = Recompute.none
    recompute_num_layers: int = 1  # layers recomputed at a time, with recompute_granularity=full
    seed: int = 1234  # seed of the order of problems and of all sampling
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        positive(
            "model",
            self,
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "micro_batch_size",
            "global_batch_size",
            "make_vocab_size_divisible_by",
            "recompute_num_layers",
        )
        require(
            self.recompute_num_layers == 1 or self.recompute_granularity is Recompute.full,
            f"model.recompute_num_layers is {self.recompute_num_layers} and "
            f"model.recompute_granularity is {self.recompute_granularity.value}: it would be "
            "ignored; set recompute_granularity=full",
        )
        require(
            self.packed_sequence_size >= 0,
            f"model.packed_sequence_size is {self.packed_sequence_size}: it must be above 0, or 0 "
            "for padded sequences",
        )
        require(
            not self.packed_sequence_size or self.micro_batch_size == 1,
            f"model.packed_sequence_size is {self.packed_sequence_size} and "
            f"model.micro_batch_size is {self.micro_batch_size}: a packed micro-batch is one row; "
            "set model.micro_batch_size=1",
        )
        require(
            self.virtual_pipeline_model_parallel_size == 1 or self.pipeline_model_parallel_size > 1,
            f"model.virtual_pipeline_model_parallel_size is "
            f"{self.virtual_pipeline_model_parallel_size} with model.pipeline_model_parallel_size "
            "1: there are no stages to interleave; set it to 1",
        )
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "model.sequence_parallel is true with model.tensor_model_parallel_size 1: "
            "it splits activations over the tensor-parallel group, so that must be above 1",
        )

        require(
            self.moe_aux_loss_coeff >= 0,
            f"model.moe_aux_loss_coeff is {self.moe_aux_loss_coeff}: it must be 0 (off) or above",
        )

    @property
    def expert_layout_size(self) -> int:
        """Ranks that hold one copy of all experts, which are spread over tensor, context and data.

        The experts of a stage lie on ``expert_model_parallel_size`` of its ranks, whatever those
        ranks are to the other layers.
        """
        return self.expert_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the student."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )
