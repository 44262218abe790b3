"""FLOPs and seconds of a step, from stated rates: a projection, to be replaced by a measurement.

A matrix product of a weight costs 2 FLOPs a parameter and token; causal attention 2 q s FLOPs a
token and layer (both products, half of the s columns). Forward and backward are 3 forwards.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from nemo_paced.config import Recompute, TeacherPlacement
from nemo_paced.hf.architectures import Architecture
from nemo_paced.sizing.hardware import Assumptions, Cluster
from nemo_paced.sizing.memory import teacher_weights
from nemo_paced.sizing.parameters import active_parameters, model_parameters, stage_parameters
from nemo_paced.sizing.shapes import Layout, TeacherPlan, Work, padded_vocab


@dataclass(frozen=True, slots=True)
class Server:
    """The rollout servers, all alike.

    Attributes:
        tensor: GPUs of each server.
        memory: bytes that a server takes of each of its GPUs.
        max_num_seqs: sequences that each server decodes at once.
        replicas: number of servers, which share requests evenly.
    """

    tensor: int
    memory: float
    max_num_seqs: int
    replicas: int = 1

    @property
    def gpus(self) -> int:
        return self.tensor * self.replicas

    def stages(self, layout: Layout) -> int:
        """Number of the student's pipeline stages that lie on GPUs of the servers.

        The run's own servers take the first GPUs of rank 0's node; a stage's ranks are consecutive.
        """
        ranks = layout.world_size // layout.pipeline
        return min(layout.pipeline, -(-self.gpus // ranks))


@dataclass(frozen=True, slots=True)
class StepFlops:
    """FLOPs of a step by part, of all ranks together.

    Attributes:
        student: forward and backward of the layers.
        recompute: what backward computes again.
        loss: LM heads and their gradients.
        teacher: forward of the layers.
        rollouts: prompts and decoding, as the mean over all steps.
    """

    student: float
    recompute: float
    loss: float
    teacher: float
    rollouts: float


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step, one after the other; rollouts as the mean over all steps.

    Attributes:
        student, teacher: time of their FLOPs, with the pipelines' idle time.
        communication: tensor, context and data parallelism.
        memory: optimizer, and weights that come from host memory.
    """

    student: float
    teacher: float
    rollouts: float
    communication: float
    memory: float

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


def forward_flops(shape: Architecture, tokens: float, sequence: float) -> float:
    """FLOPs of a forward pass of the layers, without embedding and LM head.

    Args:
        tokens: in all.
        sequence: tokens that see each other.
    """
    attention = 2 * shape.q_width * sequence * shape.num_layers
    return tokens * (2 * active_parameters(shape) + attention)


def step_flops(
    student: Architecture, teacher: Architecture, layout: Layout, plan: TeacherPlan, work: Work
) -> StepFlops:
    """FLOPs of one global batch; sequences count with their padding, unless packed."""
    sequence = work.attended(layout)
    tokens = work.global_batch_size * sequence
    forward = forward_flops(student, tokens, sequence)
    core = tokens * 2 * student.q_width * sequence * student.num_layers
    again = {Recompute.none: 0.0, Recompute.selective: core, Recompute.full: forward}
    teacher_sequence = work.attended(plan.layout, teacher=True)
    runs = plan.placement is not TeacherPlacement.cached
    responses = work.global_batch_size * work.mean_response
    # logits of both models, two gradients
    heads = 3 * student.hidden_size + (0 if work.top_k else teacher.hidden_size)
    whole = active_parameters(student) + student.vocab_size * student.hidden_size
    sampled = work.global_batch_size * (work.mean_prompt + work.mean_response)
    return StepFlops(
        student=3 * forward,
        recompute=again[layout.recompute],
        loss=2 * responses * padded_vocab(student, teacher, work, layout.tensor) * heads,
        teacher=runs
        * forward_flops(teacher, work.global_batch_size * teacher_sequence, teacher_sequence),
        rollouts=work.on_policy * 2 * whole * sampled,
    )


def step_time(
    student: Architecture,
    teacher: Architecture,
    layout: Layout,
    plan: TeacherPlan,
    work: Work,
    cluster: Cluster,
    server: Server,
    assume: Assumptions,
) -> StepTime:
    """Seconds of a step on ``layout.world_size`` GPUs (and those of a separate teacher)."""
    flops = step_flops(student, teacher, layout, plan, work)
    gpu = cluster.gpu
    trained = flops.student + flops.recompute + flops.loss
    rate = gpu.fp8 if plan.fp8 else gpu.bf16
    teacher_s = flops.teacher / (plan.layout.world_size * rate * assume.forward_mfu)
    return StepTime(
        student=trained
        / (layout.world_size * gpu.bf16 * assume.training_mfu)
        * _idle(layout, work),
        teacher=teacher_s * _idle(plan.layout, work, teacher=True),
        rollouts=work.on_policy
        * rollout_seconds(student, work.global_batch_size, work, cluster, server, assume),
        communication=_communication(student, teacher, layout, plan, work, cluster, assume),
        memory=_memory_seconds(student, teacher, layout, plan, work, cluster, assume),
    )


def rollout_seconds(
    shape: Architecture,
    responses: int,
    work: Work,
    cluster: Cluster,
    server: Server,
    assume: Assumptions,
) -> float:
    """Seconds to sample ``responses``, in decoding steps of as many sequences as the servers hold.

    A decoding step takes its roofline: weights and KV cache are read once, FLOPs grow with the
    sequences.
    """
    gpu = cluster.gpu
    responses = -(-responses // server.replicas)  # those of one server; servers work side by side
    held = kv_cache_tokens(shape, work, server, assume) / (work.mean_prompt + work.mean_response)
    at_once = max(1.0, min(server.max_num_seqs, responses, held))
    context = work.mean_prompt + work.mean_response / 2
    weights = work.precision_bytes * model_parameters(shape)
    read = weights + at_once * context * kv_bytes(shape, work)
    whole = active_parameters(shape) + shape.vocab_size * shape.hidden_size
    token_s = max(
        read / (server.tensor * gpu.hbm * assume.bandwidth),
        2 * whole * at_once / (server.tensor * gpu.bf16 * assume.rollout_mfu),
    )
    prefill_s = 2 * whole * work.mean_prompt / (server.tensor * gpu.bf16 * assume.rollout_mfu)
    waves = responses / at_once
    return waves * work.mean_response * (token_s + assume.decode_overhead_s) + (
        responses * prefill_s
    )


def kv_bytes(shape: Architecture, work: Work) -> float:
    """Bytes of keys and values of one token over all layers."""
    return 2 * work.precision_bytes * shape.num_layers * shape.kv_width


def kv_cache_tokens(shape: Architecture, work: Work, server: Server, assume: Assumptions) -> float:
    """Tokens of KV cache that the GPUs of one server hold beside its weights; at least 0."""
    weights = work.precision_bytes * model_parameters(shape)
    room = server.tensor * (server.memory - assume.server_overhead) - weights
    return max(0.0, room / kv_bytes(shape, work))


def _idle(layout: Layout, work: Work, *, teacher: bool = False) -> float:
    """Factor on a step's time by the pipeline's bubble and empty rows of micro-batches."""
    count = work.micro_batches(layout, teacher=teacher)
    size = work.teacher_micro_batch_size if teacher else work.micro_batch_size
    filled = 1.0 if work.packed else layout.data * count * size / work.global_batch_size
    return (1 + (layout.pipeline - 1) / (count * layout.virtual)) * filled


def _communication(
    student: Architecture,
    teacher: Architecture,
    layout: Layout,
    plan: TeacherPlan,
    work: Work,
    cluster: Cluster,
    assume: Assumptions,
) -> float:
    gpu, e = cluster.gpu, work.precision_bytes
    again = 1.5 if layout.recompute is Recompute.full else 1.0
    # tensor parallelism: two all-reduces (or their halves) a layer forward, two backward
    tensor = 4 * again * _all_reduces(student, layout, work, teacher=False)
    if plan.placement is not TeacherPlacement.cached:
        tensor += 2 * _all_reduces(teacher, plan.layout, work, teacher=True)
    # context parallelism: keys and values go round, and their gradients come back
    tokens = work.share(layout) * work.attended(layout) / layout.context
    layers = student.num_layers // layout.pipeline
    ring = layers * (layout.context - 1) * tokens * 2 * student.kv_width / layout.tensor * e * 3
    inside = layout.tensor * layout.context <= cluster.gpus_per_node
    replicas = layout.data * layout.context
    rows = padded_vocab(student, teacher, work, layout.tensor)
    own = stage_parameters(student, layout, 0, rows).total
    one_node = layout.world_size <= cluster.gpus_per_node
    reduce = 4 * own * 2 * (replicas - 1) / replicas
    return (
        tensor / gpu.nvlink
        + ring / (gpu.nvlink if inside else gpu.network)
        + reduce / (gpu.nvlink if one_node else gpu.network)
    ) / assume.bandwidth


def _all_reduces(shape: Architecture, layout: Layout, work: Work, *, teacher: bool) -> float:
    """Bytes that a rank sends in one all-reduce of hidden states in each of its layers."""
    tokens = work.share(layout) * work.attended(layout, teacher=teacher) / layout.context
    layers = shape.num_layers // layout.pipeline
    part = 2 * (layout.tensor - 1) / layout.tensor
    return layers * part * tokens * shape.hidden_size * work.precision_bytes


def _memory_seconds(
    student: Architecture,
    teacher: Architecture,
    layout: Layout,
    plan: TeacherPlan,
    work: Work,
    cluster: Cluster,
    assume: Assumptions,
) -> float:
    rows = padded_vocab(student, teacher, work, layout.tensor)
    own: float = stage_parameters(student, layout, 0, rows).total
    if layout.distributed_optimizer:
        own /= layout.data * layout.context
    # gradient, master weight and two moments are read, the last three and the weight written
    update = own * (16 + 12 + work.precision_bytes) / cluster.gpu.hbm
    fetched = 0.0
    if plan.placement is TeacherPlacement.offloaded:
        fetched = teacher_weights(teacher, plan, work, rows) / cluster.gpu.pcie
    return (update + fetched) / assume.bandwidth
