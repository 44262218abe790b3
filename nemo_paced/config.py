"""Every setting of a run, with its default, in one place.

Defaults live on these dataclasses and nowhere else; YAML under ``conf/`` holds only differences and
an unknown key is refused by omegaconf. A combination that cannot work raises
:class:`~nemo_paced.errors.ConfigError` here, before a process group, a model or a server exists,
with the dotted name of the key, its value and the remedy. Names follow NeMo's
(``trainer``, ``exp_manager``, ``model``, ``model.optim``), where NeMo has one.

This module imports neither torch nor NeMo: ``--help`` and ``--cfg job`` stay fast.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from nemo_paced.errors import ConfigError


class Precision(Enum):
    """The dtype of forward and backward; master weights are always fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


# as Lightning and NeMo spell them; all of them keep fp32 master weights here
_PRECISIONS = {
    "bf16": Precision.bf16,
    "bf16-mixed": Precision.bf16,
    "bf16-true": Precision.bf16,
    "fp32": Precision.fp32,
    "32": Precision.fp32,
    "32-true": Precision.fp32,
}


class DivergenceKind(Enum):
    """``stages[].divergence``; the values are those of ``losses.divergence.Divergence``."""

    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jsd = "jsd"
    skew_forward_kl = "skew_forward_kl"
    skew_reverse_kl = "skew_reverse_kl"
    adaptive_kl = "adaptive_kl"


class ResponseSource(Enum):
    """``stages[].responses``: stored teacher responses, or fresh samples of the current student."""

    references = "references"
    rollouts = "rollouts"


class Recompute(Enum):
    """``model.recompute_granularity``: what backward computes again instead of keeping it."""

    none = "none"
    selective = "selective"  # attention itself
    full = "full"  # whole layers: model.recompute_num_layers at a time


class OptimBackend(Enum):
    """``model.optim.backend``: whose fused Adam runs."""

    auto = "auto"  # Transformer Engine's, else Apex's, else torch's
    transformer_engine = "transformer_engine"
    apex = "apex"
    torch = "torch"


class ReferenceSource(Enum):
    """``references.source``: where y_T of a problem comes from."""

    teacher = "teacher"  # sampled from the teacher, which sees the privileged context
    solution = "solution"  # the data's expert solution as it stands
    file = "file"  # references.path: JSONL or Parquet with `id` and `response`


class PrivilegedContext(Enum):
    """``teacher.privileged_context``: what the teacher's prompt holds beyond the student's."""

    expert_solution = "expert_solution"
    answer = "answer"
    none = "none"


class TeacherPlacement(Enum):
    """``teacher.placement``: where the teacher's weights are while the student trains."""

    colocated = "colocated"  # on the student's devices, beside it
    offloaded = "offloaded"  # in pinned host memory; on the devices for the teacher's phase only
    # Signals of all stored responses are computed before the first step and kept on disk; the
    # teacher is freed then. Forward KL only: fresh samples cannot be known before.
    cached = "cached"
    separate = "separate"  # on ranks of its own (teacher.separate_ranks), one step ahead


class Fp8Backend(Enum):
    """``teacher.fp8.backend``: whose FP8 GEMMs run."""

    auto = "auto"  # transformer_engine on a GPU that has it, torch otherwise
    transformer_engine = "transformer_engine"
    torch = "torch"  # torch._scaled_mm; the CPU has it too


class Fp8Recipe(Enum):
    """``teacher.fp8.recipe``: which values share a scale. Spelt as Megatron spells them."""

    auto = "auto"  # the finest scales that backend and GPU have
    rowwise = "rowwise"  # a token, an output feature of a weight (torch)
    tensorwise = "tensorwise"  # a whole tensor (transformer_engine)
    blockwise = "blockwise"  # 1 x 128 of a token, 128 x 128 of a weight (transformer_engine)
    mxfp8 = "mxfp8"  # 32 values, scale a power of 2 (transformer_engine, Blackwell)


class WeightScheme(Enum):
    """``weights.scheme``: the function from pass rate to problem weight."""

    beta_kernel = "beta_kernel"  # p^alpha (1-p)^beta: PACED
    unweighted = "unweighted"
    hard_filter = "hard_filter"  # 1 where low <= p <= high


class Estimator(Enum):
    """``weights.estimator``: what the Beta kernel is taken of, with c of K rollouts right."""

    plug_in = "plug_in"  # the kernel at c / K: the paper's; 0 where all or none were right
    posterior = "posterior"  # the kernel's mean over what is known of the pass rate; never 0


class Reestimation(Enum):
    """``weights.reestimate``: what moves pass rates besides ``stages[].reestimate_pass_rates``."""

    never = "never"
    every_n_steps = "every_n_steps"  # weights.num_rollouts new rollouts of every problem
    free = "free"  # the on-policy stages' own rollouts, which are graded anyway


class Reduction(Enum):
    """``loss.reduction``: what is divided by what (see ``losses/reduction.py``)."""

    token_sum = "token_sum"
    sequence_mean = "sequence_mean"
    token_mean = "token_mean"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _positive(section: str, obj: Any, *names: str) -> None:
    for name in names:
        value = getattr(obj, name)
        _require(value > 0, f"{section}.{name} is {value}: it must be above 0")


def _refuse_ignored(
    section: str, obj: Any, names: tuple[str, ...], because: str, remedy: str
) -> None:
    """Keys that mean nothing beside another one must be at their defaults."""
    for f in dataclasses.fields(obj):
        if f.name not in names:
            continue
        value = getattr(obj, f.name)
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        _require(
            value == default,
            f"{section}.{f.name} is {to_dict(value)} and {because}: it would be ignored; "
            f"{remedy}, or leave it out",
        )


@dataclass
class TrainerConfig:
    """NeMo's ``trainer`` block, as far as this trainer honours it."""

    num_nodes: int = 1
    devices: int = 1  # ranks on each node: GPUs, or processes of the CPU build
    accelerator: str = "auto"  # auto | gpu | cpu
    max_steps: int = 200
    val_check_interval: int = 0  # optimizer steps between held-out validations; 0: never
    log_every_n_steps: int = 1
    precision: str = "bf16"  # bf16 (also bf16-mixed, bf16-true) or fp32 (also 32, 32-true)
    gradient_clip_val: float = 1.0  # global norm; 0: no clipping

    def __post_init__(self) -> None:
        _positive("trainer", self, "num_nodes", "devices", "max_steps", "log_every_n_steps")
        for name in ("val_check_interval", "gradient_clip_val"):
            value = getattr(self, name)
            _require(value >= 0, f"trainer.{name} is {value}: it must be 0 (off) or above")
        _require(
            self.precision in _PRECISIONS,
            f"trainer.precision is {self.precision!r}: choose of {', '.join(_PRECISIONS)}",
        )
        _require(
            self.accelerator in ("auto", "gpu", "cpu"),
            f"trainer.accelerator is {self.accelerator!r}: choose auto, gpu or cpu",
        )

    @property
    def compute_precision(self) -> Precision:
        return _PRECISIONS[self.precision]


@dataclass
class CheckpointCallbackParams:
    """``exp_manager.checkpoint_callback_params``: the keys of NeMo's that are honoured."""

    every_n_train_steps: int = 100
    save_top_k: int = 3  # checkpoints kept, newest first; -1: all
    save_best_k: int = 0  # and so many more, best by validation/accuracy
    async_save: bool = False  # write in the background while training goes on

    def __post_init__(self) -> None:
        where = "exp_manager.checkpoint_callback_params"
        _positive(where, self, "every_n_train_steps")
        _require(
            self.save_top_k == -1 or self.save_top_k >= 1,
            f"{where}.save_top_k is {self.save_top_k}: it must be -1 (keep all) or at least 1, "
            "a run without a checkpoint cannot be resumed",
        )
        _require(self.save_best_k >= 0, f"{where}.save_best_k is {self.save_best_k}: 0 or above")


@dataclass
class ExpManagerSettings:
    """NeMo's ``exp_manager`` block: the keys of ``ExpManagerConfig`` that this trainer honours.

    The others drive Lightning callbacks that this training loop never runs; setting one is refused.
    The run directory is ``exp_dir/name[/version]``.
    """

    exp_dir: str = "nemo_experiments"
    name: str = "paced"
    version: str | None = None
    use_datetime_version: bool = False
    resume_if_exists: bool = True
    create_tensorboard_logger: bool = True
    create_wandb_logger: bool = False
    wandb_logger_kwargs: dict[str, Any] = field(default_factory=dict)
    create_mlflow_logger: bool = False
    mlflow_logger_kwargs: dict[str, Any] = field(default_factory=dict)
    checkpoint_callback_params: CheckpointCallbackParams = field(
        default_factory=CheckpointCallbackParams
    )


@dataclass
class SchedConfig:
    """``model.optim.sched``: NeMo's names; steps are optimizer steps."""

    name: str = "constant"  # constant | CosineAnnealing | linear
    warmup_steps: int = 0
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        _require(
            self.name in ("constant", "CosineAnnealing", "linear"),
            f"model.optim.sched.name is {self.name!r}: choose constant, CosineAnnealing or linear",
        )
        _require(
            self.warmup_steps >= 0, f"model.optim.sched.warmup_steps is {self.warmup_steps}: >= 0"
        )


@dataclass
class OptimConfig:
    """``model.optim``; the defaults are the paper's (AdamW, constant 1e-7, decay 0.01)."""

    name: str = "adamw"
    lr: float = 1e-7
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    backend: OptimBackend = OptimBackend.auto
    # Moments and master weights are split over the data-parallel ranks.
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False  # reduce gradients while backward goes on
    overlap_param_gather: bool = False  # gather updated weights while forward goes on
    sched: SchedConfig = field(default_factory=SchedConfig)

    def __post_init__(self) -> None:
        _require(
            self.name in ("adam", "adamw"),
            f"model.optim.name is {self.name!r}: choose adamw (decoupled decay) or adam",
        )
        _positive("model.optim", self, "lr", "eps")
        _require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            f"model.optim.betas is {self.betas}: two numbers in [0, 1) are needed",
        )
        _require(
            not self.overlap_param_gather
            or (self.use_distributed_optimizer and self.overlap_grad_reduce),
            "model.optim.overlap_param_gather is true: it needs use_distributed_optimizer=true "
            "and overlap_grad_reduce=true as well",
        )
        _require(
            self.sched.min_lr <= self.lr,
            f"model.optim.sched.min_lr is {self.sched.min_lr}, above model.optim.lr {self.lr}",
        )


@dataclass
class ModelConfig:
    """NeMo's ``model`` block: layout, batch sizes and optimizer of the student."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    # Chunks of layers that each pipeline stage holds, interleaved: the more, the smaller the bubble
    # and the more messages. The teacher, which only runs forward, has one.
    virtual_pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    sequence_parallel: bool = False
    # Router's load-balancing loss. 0 for distillation: the teacher says where the student should
    # go, and the balance that pre-training reached is kept.
    moe_aux_loss_coeff: float = 0.0
    micro_batch_size: int = 2  # sequences
    # Tokens of a row in which sequences are packed, without padding to the longest and without
    # seeing each other; 0: padded. The teacher's rows hold at least its longest sequence.
    packed_sequence_size: int = 0
    global_batch_size: int = 32  # problems an optimizer step
    make_vocab_size_divisible_by: int = 128
    recompute_granularity: Recompute = Recompute.none
    recompute_num_layers: int = 1  # with recompute_granularity=full
    seed: int = 1234
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        _positive(
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
        _require(
            self.recompute_num_layers == 1 or self.recompute_granularity is Recompute.full,
            f"model.recompute_num_layers is {self.recompute_num_layers} and "
            f"model.recompute_granularity is {self.recompute_granularity.value}: it would be "
            "ignored; set recompute_granularity=full",
        )
        _require(
            self.packed_sequence_size >= 0,
            f"model.packed_sequence_size is {self.packed_sequence_size}: it must be above 0, or 0 "
            "for padded sequences",
        )
        _require(
            not self.packed_sequence_size or self.micro_batch_size == 1,
            f"model.packed_sequence_size is {self.packed_sequence_size} and "
            f"model.micro_batch_size is {self.micro_batch_size}: a packed micro-batch is one row; "
            "set model.micro_batch_size=1",
        )
        _require(
            self.virtual_pipeline_model_parallel_size == 1 or self.pipeline_model_parallel_size > 1,
            f"model.virtual_pipeline_model_parallel_size is "
            f"{self.virtual_pipeline_model_parallel_size} with model.pipeline_model_parallel_size "
            "1: there are no stages to interleave; set it to 1",
        )
        _require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "model.sequence_parallel is true with model.tensor_model_parallel_size 1: "
            "it splits activations over the tensor-parallel group, so that must be above 1",
        )

        _require(
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


@dataclass
class StudentConfig:
    hf_path: str = ""  # Hugging Face directory: config, weights, tokenizer


@dataclass
class Fp8Config:
    """``teacher.fp8``: the frozen teacher's linear layers in FP8 (E4M3), weights and activations.

    Embedding, LM head, norms and attention itself stay as they are.
    """

    enabled: bool = False
    backend: Fp8Backend = Fp8Backend.auto
    recipe: Fp8Recipe = Fp8Recipe.auto
    num_layers_at_start_in_bf16: int = 0  # counted over all pipeline stages
    num_layers_at_end_in_bf16: int = 0
    # Before the first step: how far does FP8 move the teacher? Written to fp8_certificate.json.
    certificate: bool = True
    certificate_problems: int = 16
    # Mean KL(BF16 || FP8) that is let pass, nats a token. By Pinsker's inequality a token with this
    # KL has at most 10 % of its probability mass moved (sqrt(max_kl / 2)); a student that starts
    # 0.2 nats from its teacher is asked to move ten times as far.
    max_kl: float = 0.02

    def __post_init__(self) -> None:
        _positive("teacher.fp8", self, "certificate_problems", "max_kl")
        for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
            value = getattr(self, name)
            _require(value >= 0, f"teacher.fp8.{name} is {value}: it must be 0 or above")
        if not self.enabled:
            self._refuse_ignored("enabled", tuple(f.name for f in dataclasses.fields(self)))
        elif not self.certificate:
            self._refuse_ignored("certificate", ("certificate_problems", "max_kl"))
        has_rows = self.backend is Fp8Backend.torch
        backends = {
            Fp8Recipe.auto: self.backend,
            Fp8Recipe.rowwise: Fp8Backend.torch,
        }
        wanted = backends.get(self.recipe, Fp8Backend.transformer_engine)
        _require(
            self.backend in (Fp8Backend.auto, wanted),
            f"teacher.fp8.recipe is {self.recipe.value} and teacher.fp8.backend is "
            f"{self.backend.value}, which does not have it: choose "
            f"{'rowwise' if has_rows else 'tensorwise, blockwise or mxfp8'}, or leave it at auto",
        )

    def _refuse_ignored(self, switch: str, names: tuple[str, ...]) -> None:
        _refuse_ignored(
            "teacher.fp8",
            self,
            names,
            f"teacher.fp8.{switch} is false",
            f"set teacher.fp8.{switch}=true",
        )


@dataclass
class TeacherConfig:
    """The frozen teacher. An empty ``hf_path`` is self-distillation: a copy of the student."""

    hf_path: str = ""
    privileged_context: PrivilegedContext = PrivilegedContext.expert_solution
    # Its own layout over the same ranks; 0: the student's. Context parallelism is never used.
    tensor_model_parallel_size: int = 0
    pipeline_model_parallel_size: int = 0
    expert_model_parallel_size: int = 0
    placement: TeacherPlacement = TeacherPlacement.colocated
    # The last so many of the job's ranks run the teacher alone; with placement=separate.
    separate_ranks: int = 0
    micro_batch_size: int = 0  # sequences; 0: model.micro_batch_size
    # 0: hidden states, from which the loss is exact; above: its k likeliest tokens and the mass of
    # the rest, from which it is a lower bound.
    top_k: int = 0
    # Keeps the signals of stored responses (forward KL) on disk, for later epochs and runs; with
    # placement=cached it is RUN/teacher_cache unless set.
    cache_dir: str | None = None
    fp8: Fp8Config = field(default_factory=Fp8Config)

    def __post_init__(self) -> None:
        _require(self.top_k >= 0, f"teacher.top_k is {self.top_k}: it must be 0 or above")
        separate = self.placement is TeacherPlacement.separate
        _require(
            separate == (self.separate_ranks > 0) and self.separate_ranks >= 0,
            f"teacher.placement is {self.placement.value} and teacher.separate_ranks is "
            f"{self.separate_ranks}: placement=separate needs ranks, the others take none",
        )
        _require(
            not (separate and self.cache_dir is not None),
            "teacher.placement is separate and teacher.cache_dir is set: a teacher a step ahead "
            "computes each signal; leave cache_dir out, or set placement=colocated",
        )
        for name in (
            "micro_batch_size",
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "expert_model_parallel_size",
        ):
            value = getattr(self, name)
            _require(
                value >= 0, f"teacher.{name} is {value}: it must be above 0, or 0 for model.{name}"
            )


@dataclass
class DataConfig:
    """Problem files (JSONL or Parquet: id, problem, answer, optional solution) and prompts.

    Templates are ``str.format`` strings over ``{problem}``, ``{solution}``, ``{answer}`` and
    ``{student_prompt}`` (the filled student prompt; in the teacher's template only).
    """

    problems: str = ""
    validation_problems: str | None = None
    forgetting_problems: str | None = None
    prompt_template: str = (
        "Solve the following math problem step by step. The last line of your response should be "
        "of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem."
        '\n\n{problem}\n\nRemember to put your answer on its own line after "Answer:".'
    )
    # Used where teacher.privileged_context is not `none`.
    teacher_prompt_template: str = (
        "Problem:\n{problem}\n\nA reference for your guidance:\n{context}\n\nUse it to answer in "
        "your own words, not verbatim.\n\n{student_prompt}"
    )
    use_chat_template: bool = True
    max_prompt_length: int = 1024  # tokens of the student's prompt
    max_teacher_prompt_length: int = 3072
    max_response_length: int = 8192  # tokens, EOS included
    shuffle: bool = True

    def __post_init__(self) -> None:
        _positive(
            "data", self, "max_prompt_length", "max_teacher_prompt_length", "max_response_length"
        )
        for name in ("prompt_template", "teacher_prompt_template"):
            _require(
                "{problem}" in getattr(self, name) or "{student_prompt}" in getattr(self, name),
                f"data.{name} has no {{problem}} field: every prompt would be the same",
            )


@dataclass
class ReferencesConfig:
    """Where the stored responses of forward KL come from."""

    source: ReferenceSource = ReferenceSource.teacher
    path: str | None = None
    # Running servers of the teacher (rollout-server --model teacher) instead of our own.
    endpoints: list[str] = field(default_factory=list)
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        _require(
            (self.source is ReferenceSource.file) == (self.path is not None),
            f"references.source is {self.source.value} and references.path is {self.path!r}: "
            "source=file needs a path, the other sources take none",
        )
        _require(
            not self.endpoints or self.source is ReferenceSource.teacher,
            f"references.endpoints is set and references.source is {self.source.value}: no "
            "teacher is asked then; remove one of the two",
        )


@dataclass
class AdaptiveConfig:
    """``weights.adaptive``: rollouts go where they lower the error of the weights most.

    ``weights.num_rollouts`` is then the mean over the problems; a larger one continues the rollouts
    of a smaller one.
    """

    enabled: bool = False
    initial_rollouts: int = 2  # of every problem, in the first round
    rollouts_per_round: float = 1.0  # a problem, in the mean; fewer: better spent, more rounds
    max_rollouts: int = 64  # of one problem
    # Expected RMS error of the weights (whose mean is 1) at which to stop before
    # weights.num_rollouts are spent; 0: spend them.
    target_error: float = 0.0

    def __post_init__(self) -> None:
        where = "weights.adaptive"
        _positive(where, self, "initial_rollouts", "rollouts_per_round", "max_rollouts")
        _require(
            self.target_error >= 0,
            f"{where}.target_error is {self.target_error}: above 0, or 0 to spend the budget",
        )
        if not self.enabled:
            _refuse_ignored(
                where,
                self,
                ("initial_rollouts", "rollouts_per_round", "max_rollouts", "target_error"),
                "weights.adaptive.enabled is false",
                "set weights.adaptive.enabled=true",
            )


@dataclass
class WeightsConfig:
    """From pass rates to problem weights; paper's defaults."""

    scheme: WeightScheme = WeightScheme.beta_kernel
    alpha: float = 1.0
    beta: float = 1.0
    low: float = 0.2  # hard_filter only
    high: float = 0.8
    estimator: Estimator = Estimator.plug_in
    prior: list[float] = field(default_factory=lambda: [1.0, 1.0])  # Beta(a0, b0); posterior only
    fit_prior: bool = False  # to the counts themselves, by maximum likelihood; posterior only
    num_rollouts: int = 8  # K
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    pass_rates: str | None = None  # table of an earlier `pass-rates`, instead of sampling at step 0
    reestimate: Reestimation = Reestimation.never
    reestimate_every_n_steps: int = 0  # with reestimate=every_n_steps
    # reestimate=free: what a problem's earlier counts are multiplied by at each new rollout; at
    # most 1 / (1 - discount) rollouts are remembered.
    discount: float = 0.9
    # reestimate=free: share of the batch's problems of weight 0 that are sampled and graded (not
    # trained on), so that they can come back.
    exploration: float = 0.0

    def __post_init__(self) -> None:
        _positive("weights", self, "num_rollouts")
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            _require(value >= 0, f"weights.{name} is {value}: exponents must be 0 or above")
        _require(
            0 <= self.low < self.high <= 1,
            f"weights.low, weights.high are {self.low}, {self.high}: need 0 <= low < high <= 1",
        )
        self._check_estimator()
        self._check_adaptive()
        self._check_reestimation()

    @property
    def may_be_zero(self) -> bool:
        """Whether a problem can have weight 0, so that on-policy stages do not sample it."""
        if self.scheme is WeightScheme.beta_kernel:
            return self.estimator is Estimator.plug_in and (self.alpha > 0 or self.beta > 0)
        return self.scheme is WeightScheme.hard_filter

    def _check_estimator(self) -> None:
        _require(
            len(self.prior) == 2 and min(self.prior) > 0,
            f"weights.prior is {self.prior}: two numbers above 0 are needed",
        )
        if self.estimator is Estimator.plug_in:
            _refuse_ignored(
                "weights",
                self,
                ("prior", "fit_prior"),
                "weights.estimator is plug_in",
                "set weights.estimator=posterior",
            )
            return
        _require(
            self.scheme is WeightScheme.beta_kernel,
            f"weights.estimator is posterior and weights.scheme is {self.scheme.value}, which is "
            "no function of a posterior: it would be ignored; set weights.estimator=plug_in",
        )
        _require(
            not self.fit_prior or self.prior == [1.0, 1.0],
            f"weights.prior is {self.prior} and weights.fit_prior is true, which replaces it: "
            "leave one of them out",
        )

    def _check_adaptive(self) -> None:
        adaptive = self.adaptive
        if not adaptive.enabled:
            return
        _require(
            self.estimator is Estimator.posterior,
            "weights.adaptive.enabled is true and weights.estimator is plug_in, which stopping "
            "early would bias; set weights.estimator=posterior",
        )
        _require(
            adaptive.initial_rollouts <= self.num_rollouts <= adaptive.max_rollouts,
            f"weights.num_rollouts is {self.num_rollouts}, the mean over the problems: it must lie "
            f"between weights.adaptive.initial_rollouts {adaptive.initial_rollouts} and "
            f"weights.adaptive.max_rollouts {adaptive.max_rollouts}",
        )

    def _check_reestimation(self) -> None:
        periodic = self.reestimate is Reestimation.every_n_steps
        _require(
            periodic == (self.reestimate_every_n_steps > 0) and self.reestimate_every_n_steps >= 0,
            f"weights.reestimate is {self.reestimate.value} and weights.reestimate_every_n_steps "
            f"is {self.reestimate_every_n_steps}: every_n_steps needs a number above 0, the others "
            "take none",
        )
        _require(0 < self.discount <= 1, f"weights.discount is {self.discount}: in (0, 1]")
        _require(
            0 <= self.exploration <= 1, f"weights.exploration is {self.exploration}: in [0, 1]"
        )
        if self.reestimate is not Reestimation.free:
            _refuse_ignored(
                "weights",
                self,
                ("discount", "exploration"),
                f"weights.reestimate is {self.reestimate.value}",
                "set weights.reestimate=free",
            )


@dataclass
class StageConfig:
    """One stage: which divergence along whose responses, for what share of the steps."""

    name: str = "forward_kl"
    divergence: DivergenceKind = DivergenceKind.forward_kl
    responses: ResponseSource = ResponseSource.references
    fraction: float = 1.0  # of trainer.max_steps
    reestimate_pass_rates: bool = False  # before the stage's first step
    reset_optimizer: bool = False  # at the stage's first step

    def __post_init__(self) -> None:
        _require(
            0 < self.fraction <= 1, f"stages[{self.name}].fraction is {self.fraction}: in (0, 1]"
        )


@dataclass
class LossConfig:
    reduction: Reduction = Reduction.token_sum
    temperature: float = 1.0  # of both distributions inside the divergence
    jsd_beta: float = 0.5
    skew: float = 0.1
    akl_head_mass: float = 0.5
    chunk_size: int | None = None  # tokens a chunk of the loss; None: chosen by the loss

    def __post_init__(self) -> None:
        _positive("loss", self, "temperature")
        for name in ("jsd_beta", "skew", "akl_head_mass"):
            value = getattr(self, name)
            _require(0 < value < 1, f"loss.{name} is {value}: it must lie between 0 and 1")


@dataclass
class RolloutConfig:
    """The vLLM sidecar and how it samples."""

    temperature: float = 1.0
    top_p: float = 1.0
    # Servers of the same model, each on GPUs of its own, that share the requests.
    num_replicas: int = 1
    host: str = "127.0.0.1"  # address or network interface (ib0) that our servers listen on
    port: int = 0  # of the first replica, the others take the next ones; 0: free ones
    # Running servers instead of our own; their key is in the variable NEMO_PACED_API_KEY.
    endpoints: list[str] = field(default_factory=list)
    dtype: str = "auto"  # auto: trainer.precision
    max_num_seqs: int = 128
    max_in_flight: int = 32  # requests at a server
    kv_cache_gib: float = 1.0  # CPU build of vLLM; the GPU build uses gpu_memory_utilization
    gpu_memory_utilization: float = 0.3
    tensor_parallel_size: int = 1
    refit_every_n_steps: int = 1
    # Optimizer steps that rollouts may lag behind the student trained on them. 0: strictly
    # on-policy, trainer and server wait for each other. Above: the server samples for the steps to
    # come while this one is trained on.
    max_staleness: int = 0
    # |trainer - server| log-probability, mean over the sampled tokens of a step, nats.
    max_logprob_gap: float = 0.1
    start_timeout_s: float = 600.0
    request_timeout_s: float = 1800.0
    max_restarts: int = 2
    python: str | None = None  # interpreter that runs vLLM; None: this one

    def __post_init__(self) -> None:
        _positive(
            "rollout",
            self,
            "temperature",
            "top_p",
            "num_replicas",
            "max_num_seqs",
            "max_in_flight",
            "kv_cache_gib",
            "refit_every_n_steps",
            "max_logprob_gap",
            "start_timeout_s",
            "request_timeout_s",
            "tensor_parallel_size",
        )
        _require(self.top_p <= 1, f"rollout.top_p is {self.top_p}: it must be at most 1")
        _require(
            self.host not in ("", "0.0.0.0", "::"),
            f"rollout.host is {self.host!r}, every network of the machine: name an address or an "
            "interface that the trainer reaches it by",
        )
        _require(
            not self.endpoints or self.num_replicas == 1,
            f"rollout.num_replicas is {self.num_replicas} and rollout.endpoints is set: no server "
            "of our own is started then; remove one of the two",
        )
        _require(
            all(endpoint.startswith(("http://", "https://")) for endpoint in self.endpoints),
            f"rollout.endpoints is {self.endpoints}: each must be a URL, http://HOST:PORT",
        )
        _require(
            self.max_staleness >= self.refit_every_n_steps - 1,
            f"rollout.max_staleness is {self.max_staleness} and rollout.refit_every_n_steps "
            f"{self.refit_every_n_steps}, with which rollouts are up to "
            f"{self.refit_every_n_steps - 1} steps old: raise the first or lower the second",
        )

    @property
    def steps_ahead(self) -> int:
        """Steps that are sampled before their turn."""
        return self.max_staleness - (self.refit_every_n_steps - 1)


@dataclass
class GradingConfig:
    """``verifier``: math | exact | multiple_choice, or ``module:function`` of your own."""

    verifier: str = "math"
    time_limit_s: float = 5.0  # an item; its worker is killed then and the verdict is wrong
    num_workers: int = 2  # processes
    numeric_tolerance: float = 1e-6  # relative, where a number is written with a decimal point

    def __post_init__(self) -> None:
        _positive("grading", self, "time_limit_s", "num_workers")
        _require(
            0 <= self.numeric_tolerance < 1,
            f"grading.numeric_tolerance is {self.numeric_tolerance}: it must lie in [0, 1)",
        )


@dataclass
class EvaluationConfig:
    """Held-out accuracy: mean@k; the paper's sampling."""

    samples: int = 8
    temperature: float = 0.6
    top_p: float = 0.95
    max_response_length: int | None = None  # None: data.max_response_length

    def __post_init__(self) -> None:
        _positive("evaluation", self, "samples", "temperature", "top_p")


@dataclass
class TrainingConfig:
    """Guards of the loop."""

    max_skipped_steps: int = 5  # steps with NaN or Inf in loss or gradient before the run stops
    # A loss above this many times the median of the stage's last 50 is logged with the problems of
    # its batch; 0: never.
    loss_spike_factor: float = 5.0
    collective_timeout_s: float = 1800.0
    rank_timeout_s: float = 60.0  # preflight: a rank that has not answered by then is named

    def __post_init__(self) -> None:
        _positive("training", self, "collective_timeout_s", "rank_timeout_s")
        _require(
            self.loss_spike_factor == 0 or self.loss_spike_factor > 1,
            f"training.loss_spike_factor is {self.loss_spike_factor}: above 1, or 0 for never",
        )
        _require(self.max_skipped_steps >= 0, "training.max_skipped_steps must be 0 or above")


def two_stages() -> list[StageConfig]:
    """The paper's schedule: forward KL for the first half, then reverse KL on fresh rollouts."""
    return [
        StageConfig(name="forward_kl", fraction=0.5),
        StageConfig(
            name="reverse_kl",
            divergence=DivergenceKind.reverse_kl,
            responses=ResponseSource.rollouts,
            fraction=0.5,
            reestimate_pass_rates=True,
        ),
    ]


@dataclass
class PacedConfig:
    """The whole configuration of a run."""

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: ExpManagerSettings = field(default_factory=ExpManagerSettings)
    model: ModelConfig = field(default_factory=ModelConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    references: ReferencesConfig = field(default_factory=ReferencesConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    stages: list[StageConfig] = field(default_factory=two_stages)
    loss: LossConfig = field(default_factory=LossConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    grading: GradingConfig = field(default_factory=GradingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        self._check_stages()
        self._check_layouts()
        self._check_packing()
        self._check_teacher()
        self._check_validation()
        self._check_free_reestimation()

    def _check_stages(self) -> None:
        _require(bool(self.stages), "stages is empty: at least one stage is needed")
        names = [stage.name for stage in self.stages]
        _require(len(set(names)) == len(names), f"stages have the names {names}: they must differ")
        total = sum(stage.fraction for stage in self.stages)
        _require(abs(total - 1) < 1e-6, f"stages[].fraction sum to {total:g}: they must sum to 1")
        _require(
            not self.is_on_policy or self.rollout.top_p == 1.0,
            f"rollout.top_p is {self.rollout.top_p} with on-policy stages: their samples must come "
            "from the student's whole distribution; set rollout.top_p=1",
        )

    def _check_layouts(self) -> None:
        separate = self.teacher.separate_ranks
        _require(
            separate < self.world_size,
            f"teacher.separate_ranks is {separate} of the {self.world_size} ranks of "
            "trainer.num_nodes x trainer.devices: none is left for the student",
        )
        for key, model, ranks in (
            ("model", self.model, self.student_ranks),
            ("teacher", self.teacher_model, self.teacher_ranks),
        ):
            total = f"trainer.num_nodes x trainer.devices is {self.world_size}"
            if separate:
                total += f", {ranks} of them the {'student' if key == 'model' else key}'s"
            needed = model.model_parallel_size
            _require(
                ranks % needed == 0,
                f"{total}, which does not fit {key}.tensor_model_parallel_size "
                f"{model.tensor_model_parallel_size} x pipeline "
                f"{model.pipeline_model_parallel_size} x context {model.context_parallel_size}: "
                f"a multiple of {needed} ranks is needed; set trainer.devices={needed + separate}",
            )
            needed = model.expert_layout_size
            _require(
                ranks % needed == 0,
                f"{total}, which does not fit {key}.expert_model_parallel_size "
                f"{model.expert_model_parallel_size} x pipeline "
                f"{model.pipeline_model_parallel_size}: a multiple of {needed} ranks is needed",
            )

    def _check_packing(self) -> None:
        size = self.model.packed_sequence_size
        if not size:
            return
        longest = self.data.max_prompt_length + self.data.max_response_length
        _require(
            size >= longest,
            f"model.packed_sequence_size is {size}, below data.max_prompt_length + "
            f"data.max_response_length {longest}: raise it, or lower them",
        )
        _require(
            self.teacher.micro_batch_size in (0, 1),
            f"teacher.micro_batch_size is {self.teacher.micro_batch_size} and "
            "model.packed_sequence_size is set: a packed micro-batch is one row; set it to 1",
        )

    def _check_teacher(self) -> None:
        _require(
            not (self.is_on_policy and self.teacher.placement is TeacherPlacement.cached),
            "teacher.placement is cached and a stage trains on rollouts: signals of fresh samples "
            "cannot be computed beforehand; set teacher.placement=offloaded, or keep to stages "
            "with responses=references",
        )
        stored = any(s.responses is ResponseSource.references for s in self.stages)
        _require(
            stored or self.teacher.cache_dir is None,
            "teacher.cache_dir is set and every stage trains on rollouts: fresh samples never come "
            "again, and nothing would be kept; leave it out",
        )
        fp8 = self.teacher.fp8
        _require(
            not (self.teacher.separate_ranks and fp8.enabled and fp8.certificate),
            "teacher.placement is separate and teacher.fp8.certificate is true: the certificate is "
            "measured where both models are; certify once with placement=colocated, then set "
            "teacher.fp8.certificate=false",
        )
        self_teacher = self.teacher.hf_path == ""
        _require(
            not self_teacher or self.teacher.privileged_context is not PrivilegedContext.none,
            "teacher.hf_path is empty (self-distillation) and teacher.privileged_context is none: "
            "teacher and student would be identical and every loss 0; set "
            "teacher.privileged_context to answer or expert_solution",
        )

    def _check_validation(self) -> None:
        keep = self.exp_manager.checkpoint_callback_params
        _require(
            not keep.save_best_k or bool(self.trainer.val_check_interval),
            f"exp_manager.checkpoint_callback_params.save_best_k is {keep.save_best_k} and "
            "trainer.val_check_interval is 0: nothing says which is best; set the interval",
        )
        _require(
            not keep.save_best_k or keep.every_n_train_steps % self.trainer.val_check_interval == 0,
            f"exp_manager.checkpoint_callback_params.every_n_train_steps is "
            f"{keep.every_n_train_steps} and trainer.val_check_interval "
            f"{self.trainer.val_check_interval}: with save_best_k each checkpoint must be "
            "validated; make the first a multiple of the second",
        )
        _require(
            not self.trainer.val_check_interval or bool(self.data.validation_problems),
            f"trainer.val_check_interval is {self.trainer.val_check_interval} and "
            "data.validation_problems is not set: give a file, or set the interval to 0",
        )

    def _check_free_reestimation(self) -> None:
        weights = self.weights
        if weights.reestimate is not Reestimation.free:
            return
        _require(
            self.is_on_policy,
            "weights.reestimate is free and no stage has responses=rollouts: nothing would be "
            "sampled to estimate from; set weights.reestimate=every_n_steps, or never",
        )
        # token_mean counts the tokens of problems of weight 0 as well: all are sampled
        skips = weights.may_be_zero and self.loss.reduction is not Reduction.token_mean
        _require(
            not skips or weights.exploration > 0,
            f"weights.reestimate is free, and under weights.scheme {weights.scheme.value} with "
            "weights.estimator plug_in a problem of weight 0 is never sampled again; set "
            "weights.exploration above 0 (0.1, say), or weights.estimator=posterior",
        )
        _require(
            skips or weights.exploration == 0,
            f"weights.exploration is {weights.exploration} and every problem of a batch is sampled "
            "anyway: it would be ignored; leave it out",
        )

    @property
    def is_on_policy(self) -> bool:
        """Whether any stage trains on fresh samples of the student."""
        return any(stage.responses is ResponseSource.rollouts for stage in self.stages)

    @property
    def student_ranks(self) -> int:
        return self.world_size - self.teacher.separate_ranks

    @property
    def teacher_ranks(self) -> int:
        """Ranks that the teacher is spread over: the student's, or its own."""
        return self.teacher.separate_ranks or self.world_size

    @property
    def world_size(self) -> int:
        return self.trainer.num_nodes * self.trainer.devices

    @property
    def data_parallel_size(self) -> int:
        return self.student_ranks // self.model.model_parallel_size

    @property
    def teacher_model(self) -> ModelConfig:
        """The ``model`` block with the teacher's layout in place of the student's."""
        model, own = self.model, self.teacher
        tensor = own.tensor_model_parallel_size or model.tensor_model_parallel_size
        longest = self.data.max_teacher_prompt_length + self.data.max_response_length
        return dataclasses.replace(
            model,
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=(
                own.pipeline_model_parallel_size or model.pipeline_model_parallel_size
            ),
            expert_model_parallel_size=(
                own.expert_model_parallel_size or model.expert_model_parallel_size
            ),
            virtual_pipeline_model_parallel_size=1,
            context_parallel_size=1,
            sequence_parallel=tensor > 1,  # the same numbers in less memory; experts need it
            micro_batch_size=own.micro_batch_size or model.micro_batch_size,
            packed_sequence_size=(
                model.packed_sequence_size and max(model.packed_sequence_size, longest)
            ),
        )

    @property
    def sends_weights(self) -> bool:
        """Whether the rollout servers have to follow the student while it is trained."""
        follows = (
            stage.responses is ResponseSource.rollouts or stage.reestimate_pass_rates
            for stage in self.stages
        )
        periodic = self.weights.reestimate is Reestimation.every_n_steps
        return any(follows) or periodic or self.trainer.val_check_interval > 0

    @property
    def teacher_hf_path(self) -> str:
        return self.teacher.hf_path or self.student.hf_path


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
