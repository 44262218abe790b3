"""Memory of a rank, part by part, at the worst moment of a step.

A step has two phases. While the teacher runs, its weights, its layer's transients and the signal
are there beside the student's weights, gradients and optimizer; while the student runs, the
activations of its micro-batches in flight and the loss are. The peak is that of the larger phase.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from nemo_paced.config import Recompute, TeacherPlacement
from nemo_paced.hf.architectures import Architecture
from nemo_paced.losses.chunks import tokens_of_chunk, tokens_of_part
from nemo_paced.sizing import activations
from nemo_paced.sizing.parameters import Parameters, stage_parameters
from nemo_paced.sizing.shapes import Accelerator, Layout, TeacherPlan, Work, padded_vocab


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that one rank holds, part by part.

    Attributes:
        weights, gradients, optimizer: of the student.
        activations: kept for backward by all of the student's micro-batches in flight.
        loss: peak of the loss beyond its inputs, or of a layer's backward where that is more.
        teacher: the teacher's weights, where they stay on the GPU.
        teacher_head: the teacher's LM head, in the student's layout.
        signal: the teacher's signal of the rank's share of the global batch.
        teacher_work: transients of the teacher's forward, and weights that come for it alone.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    teacher: float
    teacher_head: float
    signal: float
    teacher_work: float

    @property
    def student_phase(self) -> float:
        return self._resident + self.activations + self.loss

    @property
    def teacher_phase(self) -> float:
        return self._resident + self.teacher_work

    @property
    def peak(self) -> float:
        return max(self.student_phase, self.teacher_phase)

    @property
    def _resident(self) -> float:
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.teacher
            + self.teacher_head
            + self.signal
        )

    def parts(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def stage_memory(
    student: Architecture,
    teacher: Architecture,
    layout: Layout,
    plan: TeacherPlan,
    work: Work,
    stage: int,
) -> Memory:
    """Memory of a rank of the student's pipeline stage ``stage``.

    Where the teacher has another number of stages, the rank is taken to hold its largest one.
    """
    rows = padded_vocab(student, teacher, work, layout.tensor)
    own = stage_parameters(student, layout, stage, rows)
    is_last = stage == layout.pipeline - 1
    resident = plan.placement is TeacherPlacement.colocated
    same_stages = plan.layout.pipeline == layout.pipeline
    teacher_bytes = teacher_weights(teacher, plan, work, rows, stage if same_stages else None)
    # an offloaded teacher comes for each of its phases, a cached one while the cache is filled
    comes = plan.placement in (TeacherPlacement.offloaded, TeacherPlacement.cached)
    teacher_work = 0.0
    if resident or comes:
        teacher_work = teacher_forward(teacher, plan.layout, work) + comes * teacher_bytes
    return Memory(
        weights=work.precision_bytes * own.total,
        gradients=4 * own.total,
        optimizer=optimizer_bytes(own, layout, work),
        activations=activation_bytes(student, layout, work, stage),
        loss=max(
            is_last * loss_bytes(student, teacher, layout, work, rows),
            transient_bytes(student, layout, work),
        ),
        teacher=teacher_bytes if resident else 0.0,
        teacher_head=is_last * head_bytes(teacher, layout, work, rows),
        signal=is_last * signal_bytes(teacher, layout, work),
        teacher_work=teacher_work,
    )


def stages_memory(
    student: Architecture, teacher: Architecture, layout: Layout, plan: TeacherPlan, work: Work
) -> list[Memory]:
    """Memory of a rank of each of the student's pipeline stages."""
    return [
        stage_memory(student, teacher, layout, plan, work, stage)
        for stage in range(layout.pipeline)
    ]


def optimizer_bytes(own: Parameters, layout: Layout, work: Work) -> float:
    """Bytes of Adam's two moments and, beside 16-bit weights, master weights: all float32."""
    each = 8 if work.precision_bytes == 4 else 12
    if not layout.distributed_optimizer:
        return each * own.total
    dense = (own.dense + own.vocabulary) / (layout.data * layout.context)
    return each * (dense + own.experts / max(1, layout.expert_data))


def activation_bytes(shape: Architecture, layout: Layout, work: Work, stage: int) -> float:
    """Bytes that the micro-batches in flight keep for backward.

    1F1B holds pipeline - stage of them; an interleaved pipeline holds chunks of layers, which go
    through the stages behind twice (Narayanan et al. 2021).
    """
    sequence = work.sequence(layout)
    tokens = work.micro_batch_size * sequence / layout.context
    behind, v = layout.pipeline - 1 - stage, layout.virtual
    chunks = behind + 1 if v == 1 else 2 * behind + (v - 1) * layout.pipeline + 1
    in_flight = min(work.micro_batches(layout), chunks / v)
    layers = shape.num_layers // layout.pipeline
    a_token = layers * activations.layer_bytes(shape, layout, work)
    if stage == layout.pipeline - 1:
        a_token += activations.final_norm_bytes(shape, layout, work)
    if layout.pipeline > 1:  # what was sent on is kept until its gradient comes
        a_token += activations.boundary_bytes(shape, layout, work)
    return in_flight * tokens * a_token


def transient_bytes(shape: Architecture, layout: Layout, work: Work) -> float:
    """Bytes of a layer's backward, with what it computes again, and of one weight's gradient."""
    sequence = work.sequence(layout)
    tokens = work.micro_batch_size * sequence / layout.context
    a_token = activations.backward_bytes(shape, layout, work)
    a_token += activations.recomputed_bytes(shape, layout, work)
    columns = shape.experts.ffn_hidden_size if shape.experts else (
        shape.ffn_hidden_size // layout.tensor
    )  # fmt: skip
    weight = 2 * columns * shape.hidden_size
    return tokens * a_token + work.precision_bytes * weight


def loss_bytes(
    student: Architecture, teacher: Architecture, layout: Layout, work: Work, rows: int
) -> float:
    """Peak bytes of ``linear_loss`` beyond weights and Megatron's gradients.

    Hidden states, their gradient, the student's logits of a chunk and the teacher's of the parts
    under way; in backward a gradient of the head that nobody reads, which DDP's hook asks for.

    Args:
        rows: of the LM heads, over all ranks of the student's layout.
    """
    e, width = work.precision_bytes, rows // layout.tensor
    tokens = work.micro_batch_size * work.responses_of_a_row(layout) // layout.context
    on_gpu = work.accelerator is Accelerator.gpu
    chunk = work.chunk_size or tokens_of_chunk(width, on_gpu=on_gpu)
    part = tokens_of_part(chunk)
    begun = 1 + (layout.tensor > 1)  # parts under way at a time
    of_teacher = 0 if work.top_k else e * width * min(begun * part, chunk, tokens)
    head = e * width * student.hidden_size
    # the CPU has no product from 16 bits into float32
    product = head if e == 2 and not on_gpu else 0
    logits = e * width * min(chunk, tokens) + max(of_teacher, product)
    hidden = e * tokens * (2 * student.hidden_size + (not work.top_k) * teacher.hidden_size)
    return hidden + max(logits, head)


def head_bytes(teacher: Architecture, layout: Layout, work: Work, rows: int) -> float:
    """Bytes of the teacher's LM head on the student's last stage, held for every kind of signal."""
    return work.precision_bytes * rows // layout.tensor * teacher.hidden_size


def signal_bytes(teacher: Architecture, layout: Layout, work: Work) -> float:
    """Bytes of the signal of the rank's share: hidden states, or k log-probabilities and ids."""
    each = 8 * work.top_k + 4 if work.top_k else work.precision_bytes * teacher.hidden_size
    return each * work.share(layout) * work.response / layout.context


def teacher_weights(
    teacher: Architecture, plan: TeacherPlan, work: Work, rows: int, stage: int | None = None
) -> float:
    """Bytes of weights of a teacher's stage (``None``: the largest), without the LM head."""
    linear = 1 if plan.fp8 else work.precision_bytes

    def of(stage: int) -> float:
        own = stage_parameters(teacher, plan.layout, stage, rows)
        embedding = (stage == 0) * rows // plan.layout.tensor * teacher.hidden_size
        return linear * (own.dense + own.experts) + work.precision_bytes * embedding

    if stage is not None:
        return of(stage)
    return max(of(0), of(plan.layout.pipeline - 1))


def teacher_forward(teacher: Architecture, layout: Layout, work: Work) -> float:
    """Bytes that one teacher layer holds while it runs forward; none are kept for backward."""
    sequence = work.sequence(layout, teacher=True)
    tokens = work.teacher_micro_batch_size * sequence
    whole = Layout(
        layout.tensor, sequence_parallel=layout.sequence_parallel, recompute=Recompute.full
    )
    return tokens * activations.recomputed_bytes(teacher, whole, work)
