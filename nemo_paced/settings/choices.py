"""Enums of the settings whose values are names."""

from __future__ import annotations

from enum import Enum


class Precision(Enum):
    """The dtype of forward and backward; master weights are always fp32."""

    fp32 = "fp32"
    bf16 = "bf16"

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return 2 if self is Precision.bf16 else 4


class ResponseSource(Enum):
    """``stages[].responses``: whose responses the student is trained along."""

    references = "references"  # stored responses of the teacher
    rollouts = "rollouts"  # fresh samples of the current student


class Recompute(Enum):
    """``model.recompute_granularity``: what backward computes again instead of keeping it."""

    none = "none"  # nothing
    selective = "selective"  # attention itself: of no use on a GPU, whose kernels keep no scores
    full = "full"  # whole layers: model.recompute_num_layers at a time


class OptimBackend(Enum):
    """``model.optim.backend``: whose fused Adam runs."""

    auto = "auto"  # Transformer Engine's, else Apex's, else torch's
    transformer_engine = "transformer_engine"
    apex = "apex"
    torch = "torch"


class ReferenceSource(Enum):
    """``references.source``: where a problem's reference response y_T comes from."""

    teacher = "teacher"  # sampled from the teacher, which sees the privileged context
    solution = "solution"  # the data's expert solution as it stands
    file = "file"  # references.path: JSONL or Parquet: `id`, `response_ids` (or `response`)


class WrongReferences(Enum):
    """``references.wrong``: what becomes of a response y_T whose answer is not the problem's."""

    keep = "keep"  # train along it all the same: the paper's
    drop = "drop"  # the problem has no reference: weight 0 in stages with responses=references
    resample = (
        "resample"  # ask again, references.max_attempts times in all; keep what is wrong then
    )


class Duplicates(Enum):
    """``data.duplicates``: what becomes of a row that repeats an earlier problem."""

    refuse = "refuse"  # the file is refused
    first = "first"  # the first row of each problem is taken


class Unanswered(Enum):
    """``data.unanswered``: what becomes of a row whose answer is none, a proof or not found."""

    refuse = "refuse"  # the file is refused
    drop = "drop"  # the row is left out


class PrivilegedContext(Enum):
    """``teacher.privileged_context``: what the teacher's prompt holds beyond the student's."""

    expert_solution = "expert_solution"  # the field `solution`
    answer = "answer"  # the final answer alone
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
    unweighted = "unweighted"  # 1
    hard_filter = "hard_filter"  # 1 where low <= p <= high


class Estimator(Enum):
    """``weights.estimator``: how the Beta kernel is estimated from c right of K rollouts."""

    plug_in = "plug_in"  # the kernel at c / K: the paper's; 0 where all or none were right
    posterior = "posterior"  # the kernel's mean over what is known of the pass rate; never 0


class Reestimation(Enum):
    """``weights.reestimate``: what moves pass rates besides ``stages[].reestimate_pass_rates``."""

    never = "never"  # nothing
    every_n_steps = "every_n_steps"  # weights.num_rollouts new rollouts of every problem
    free = "free"  # the on-policy stages' own rollouts, which are graded anyway


class RolloutPlacement(Enum):
    """``rollout.placement``: on which GPUs the run's own rollout servers work."""

    separate = "separate"  # on GPUs of rank 0's node that the trainer leaves free
    colocated = "colocated"  # on the trainer's GPUs: the servers sleep while it works


class RefitBackend(Enum):
    """``rollout.refit``: how new weights reach the rollout servers (``refit/transfer.py``)."""

    auto = "auto"  # the fastest that placement, hardware and packages allow
    file = "file"  # safetensors files in memory or on a disk that the server's process sees
    gloo = "gloo"  # over the network from CPU memory to CPU memory
    ipc = "ipc"  # CUDA IPC: colocated servers read the trainer's memory
    nccl = "nccl"  # rank 0 broadcasts whole parameters
    nccl_m2n = "nccl_m2n"  # every rank sends its shards: no rank ever has the whole model


class WeightSwap(Enum):
    """``rollout.swap``: what a new version of the weights does to responses under way."""

    between_requests = "between_requests"  # responses are finished first: one version a response
    in_flight = "in_flight"  # responses go on with the new weights: one may hold several versions


class Reduction(Enum):
    """``loss.reduction``: how token divergences become the loss (see ``losses/reduction.py``)."""

    token_sum = "token_sum"  # sums over tokens, divided by the problems of the global batch
    sequence_mean = "sequence_mean"  # means over a response's tokens, divided by those problems
    token_mean = "token_mean"  # sums over tokens, divided by the tokens of the global batch


# trainer.precision as Lightning and NeMo spell it; all values keep fp32 master weights here
PRECISIONS = {
    "bf16": Precision.bf16,
    "bf16-mixed": Precision.bf16,
    "bf16-true": Precision.bf16,
    "fp32": Precision.fp32,
    "32": Precision.fp32,
    "32-true": Precision.fp32,
}
