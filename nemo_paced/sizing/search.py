"""Search for the layouts that fit a cluster, cheapest first.

Layouts are those that divide the models: tensor parallelism within a node, pipeline stages of equal
layers, any number of data-parallel replicas (uneven batches are padded). A micro-batch of 1 and the
configured one, all placements asked for and all recomputation settings are tried; interleaved
pipelines are not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from nemo_paced.config import Recompute, TeacherPlacement
from nemo_paced.hf.architectures import Architecture
from nemo_paced.sizing.flops import Server, StepTime, step_time
from nemo_paced.sizing.hardware import Assumptions, Cluster
from nemo_paced.sizing.memory import Memory, stages_memory
from nemo_paced.sizing.shapes import Layout, TeacherPlan, Work

POWERS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """Models, cluster and rollout servers that a plan is made for.

    Attributes:
        server: the rollout servers on the trainer's first GPUs; ``None``: they run elsewhere.
        served: the rollout servers, wherever they run, by which rollouts are timed.
        assume: what is assumed of the hardware.
        sampled: whether anything is sampled from the student: else no server is started.
    """

    student: Architecture
    teacher: Architecture
    cluster: Cluster
    server: Server | None
    served: Server
    assume: Assumptions
    sampled: bool = True


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout with the memory and time that it needs.

    Attributes:
        stages: memory of a rank of each pipeline stage.
        needed: bytes of the fullest GPU, reserve and rollout server included.
        fits: whether the memory suffices, and the first node's GPUs for the rollout servers.
        time: of a step.
    """

    layout: Layout
    teacher: TeacherPlan
    work: Work
    stages: tuple[Memory, ...]
    needed: float
    fits: bool
    time: StepTime

    @property
    def gpus(self) -> int:
        own = (
            self.teacher.layout.world_size
            if self.teacher.placement is TeacherPlacement.separate
            else 0
        )
        return self.layout.world_size + own

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.time.total * self.work.max_steps / 3600


def evaluate(request: PlanRequest, layout: Layout, teacher: TeacherPlan, work: Work) -> Candidate:
    """The layout as a candidate, with its memory, step time and whether it fits."""
    stages = tuple(stages_memory(request.student, request.teacher, layout, teacher, work))
    server = request.server
    needed = request.assume.reserve + max(
        memory.peak + (server.memory if server and stage < server.stages(layout) else 0.0)
        for stage, memory in enumerate(stages)
    )
    if teacher.placement is TeacherPlacement.separate:  # on the GPUs behind the student's
        beside = server.memory if server and server.gpus > layout.world_size else 0.0
        needed = max(needed, _separate_teacher(request, layout, teacher, work) + beside)
    time = step_time(
        request.student,
        request.teacher,
        layout,
        teacher,
        work,
        request.cluster,
        request.served,
        request.assume,
    )
    found = Candidate(layout, teacher, work, stages, needed, True, time)
    fits = needed <= request.cluster.gpu.memory and not lacking_gpus(found, request)
    return replace(found, fits=fits)


def lacking_gpus(candidate: Candidate, request: PlanRequest) -> int:
    """GPUs that the rollout servers need beyond those of the first node; 0: they have enough."""
    if request.server is None:
        return 0
    return max(0, request.server.gpus - min(candidate.gpus, request.cluster.gpus_per_node))


def search(
    request: PlanRequest,
    work: Work,
    *,
    gpus: int,
    fp8: bool,
    placements: tuple[TeacherPlacement, ...],
) -> list[Candidate]:
    """Every layout of ``gpus`` GPUs that fits, cheapest first."""
    found = [
        candidate
        for layout, teacher in _layouts(request, gpus, fp8=fp8, placements=placements)
        for sized in _micro_batches(work)
        if (candidate := evaluate(request, layout, teacher, sized)).fits
    ]
    return sorted(found, key=_cost)


def fewest_gpus(
    request: PlanRequest,
    work: Work,
    *,
    limit: int,
    fp8: bool,
    placements: tuple[TeacherPlacement, ...],
) -> list[Candidate]:
    """The fitting layouts of the smallest number of GPUs (a power of two) that has one."""
    for gpus in itertools.takewhile(lambda n: n <= limit, (2**k for k in range(20))):
        found = search(request, work, gpus=gpus, fp8=fp8, placements=placements)
        if found:
            return found
    return []


def best_of_each_cut(candidates: list[Candidate]) -> list[Candidate]:
    """First candidate of each way to cut the student (tensor, pipeline, context, expert)."""
    best: dict[tuple[int, ...], Candidate] = {}
    for candidate in candidates:
        of = candidate.layout
        best.setdefault((of.tensor, of.pipeline, of.context, of.expert), candidate)
    return list(best.values())


def _cost(candidate: Candidate) -> tuple[float, ...]:
    """Sort key of candidates: step time, then, where it is the same, simplicity."""
    layout = candidate.layout
    return (
        round(candidate.time.total, 3),
        layout.tensor * layout.pipeline * layout.context,
        list(TeacherPlacement).index(candidate.teacher.placement),
        list(Recompute).index(layout.recompute),
        candidate.needed,
    )


def _micro_batches(work: Work) -> Iterator[Work]:
    follows = work.teacher_micro_batch_size == work.micro_batch_size
    for size in sorted({1, work.micro_batch_size}):  # packed rows always have 1
        of_teacher = size if follows else work.teacher_micro_batch_size
        yield replace(work, micro_batch_size=size, teacher_micro_batch_size=of_teacher)


def _layouts(
    request: PlanRequest, gpus: int, *, fp8: bool, placements: tuple[TeacherPlacement, ...]
) -> Iterator[tuple[Layout, TeacherPlan]]:
    for placement in placements:
        if placement is TeacherPlacement.separate:
            splits = [(gpus - own, own) for own in POWERS if own < gpus]
        else:
            splits = [(gpus, gpus)]
        for student_gpus, teacher_gpus in splits:
            for layout in cuts(request.student, request.cluster, student_gpus, trained=True):
                for own in cuts(request.teacher, request.cluster, teacher_gpus, trained=False):
                    yield layout, TeacherPlan(own, placement, fp8)


def cuts(shape: Architecture, cluster: Cluster, gpus: int, *, trained: bool) -> Iterator[Layout]:
    """Layouts over exactly ``gpus`` ranks that divide the model.

    Args:
        trained: whether to vary context parallelism and recomputation, which a frozen teacher has
            no use for.
    """
    contexts, recomputes = (
        # attention alone would only be computed twice: its fused kernels keep no scores
        ((1, 2, 4, 8), (Recompute.none, Recompute.full)) if trained else ((1,), (Recompute.none,))
    )
    for tensor, pipeline, context in itertools.product(POWERS, POWERS, contexts):
        ranks = tensor * pipeline * context
        if tensor > cluster.gpus_per_node or gpus % ranks or not divides(shape, tensor, pipeline):
            continue
        data = gpus // ranks
        for expert in POWERS if shape.experts else (1,):
            if shape.experts and (shape.experts.count % expert or gpus % (expert * pipeline)):
                continue
            for recompute in recomputes:
                yield Layout(
                    tensor=tensor,
                    pipeline=pipeline,
                    context=context,
                    expert=expert,
                    data=data,
                    sequence_parallel=tensor > 1,
                    recompute=recompute,
                    distributed_optimizer=trained and data * context > 1,
                )


def divides(shape: Architecture, tensor: int, pipeline: int) -> bool:
    """Whether ``tensor`` divides (key-value) heads and MLP columns, and ``pipeline`` the layers."""
    dense = shape.experts is None or len(shape.experts.layers) < shape.num_layers
    columns = (shape.num_heads, shape.num_kv_heads, *([shape.ffn_hidden_size] if dense else []))
    return not any(size % tensor for size in columns) and shape.num_layers % pipeline == 0


def _separate_teacher(
    request: PlanRequest, layout: Layout, teacher: TeacherPlan, work: Work
) -> float:
    """Bytes of a GPU that holds the teacher alone, reserve included."""
    alone = replace(teacher, placement=TeacherPlacement.colocated)
    memory = stages_memory(request.student, request.teacher, layout, alone, work)[0]
    return request.assume.reserve + memory.teacher + memory.teacher_work
