"""A plan as text: the layout that was asked for, what fits, and every assumption behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich.table import Table

from nemo_paced.config import Recompute, TeacherPlacement
from nemo_paced.sizing.flops import kv_cache_tokens, rollout_seconds, step_flops
from nemo_paced.sizing.hardware import GIB
from nemo_paced.sizing.parameters import model_parameters
from nemo_paced.sizing.search import Candidate, PlanRequest, lacking_gpus
from nemo_paced.sizing.shapes import Layout, Work

_PARTS = {
    "weights": "student weights",
    "gradients": "gradients (fp32)",
    "optimizer": "optimizer (fp32)",
    "activations": "activations in flight",
    "loss": "loss or one layer's backward",
    "teacher": "teacher weights",
    "teacher_head": "teacher LM head",
    "signal": "teacher signal",
    "teacher_work": "teacher forward",
}


def memory_table(candidate: Candidate, request: PlanRequest) -> Table:
    """Table of the GiB of a rank of each pipeline stage, part by part."""
    table = Table(title=f"GiB a GPU: {describe(candidate)}", title_justify="left")
    table.add_column("")
    for stage in range(len(candidate.stages)):
        table.add_column(f"stage {stage}", justify="right")
    for part, label in _PARTS.items():
        table.add_row(label, *(_gib(m.parts()[part]) for m in candidate.stages))
    table.add_section()
    table.add_row("student's phase", *(_gib(m.student_phase) for m in candidate.stages))
    table.add_row("teacher's phase", *(_gib(m.teacher_phase) for m in candidate.stages))
    if server := request.server:
        sharing = server.stages(candidate.layout)
        others = [""] * (len(candidate.stages) - sharing)
        which = "rank 0's GPU" if server.gpus == 1 else f"the first {server.gpus} GPUs"
        table.add_row(f"rollout server ({which})", *[_gib(server.memory)] * sharing, *others)
    table.add_row("reserve", *[_gib(request.assume.reserve)] * len(candidate.stages))
    return table


def verdict(candidate: Candidate, request: PlanRequest) -> str:
    """Whether a layout fits, by how much, and what to change where it does not; one sentence."""
    gpu = request.cluster.gpu
    room = gpu.memory - candidate.needed
    text = f"fits with {_gib(room)} GiB to spare" if room >= 0 else (
        f"does not fit: {_gib(-room)} GiB too much"
    )  # fmt: skip
    if lacking := lacking_gpus(candidate, request):
        text += (
            f"; the rollout servers need {lacking} GPUs more than the first node has: lower "
            "rollout.num_replicas or rollout.tensor_parallel_size, or serve on other GPUs "
            "(rollout.placement=separate)"
        )
    return f"fullest GPU {_gib(candidate.needed)} of {_gib(gpu.memory)} GiB ({gpu.name}): {text}"


def time_lines(candidate: Candidate, request: PlanRequest) -> Iterator[str]:
    """Lines on a layout's FLOPs, seconds, tokens a second, hours and rollouts."""
    work, time = candidate.work, candidate.time
    flops = asdict(
        step_flops(
            request.student, request.teacher, candidate.layout, candidate.teacher, work
        )
    )  # fmt: skip
    yield "FLOPs a step: " + _joined({k: f"{v:.3g}" for k, v in flops.items()})
    yield f"seconds a step: {time.total:.2f} = " + _joined(
        {k: f"{v:.2f}" for k, v in asdict(time).items()}
    )
    responses = work.global_batch_size * work.mean_response
    hours = time.total * work.max_steps / 3600
    yield (
        f"{responses / time.total:,.0f} response tokens/s; {work.max_steps} steps: {hours:.2f} h, "
        f"{candidate.gpu_hours:.1f} GPU-hours"
    )
    if not request.sampled:
        yield "rollout servers: none, nothing is sampled from the student"
        return
    held = kv_cache_tokens(request.student, work, request.served, request.assume)
    estimate = rollout_seconds(
        request.student,
        1000 * work.num_rollouts,
        work,
        request.cluster,
        request.served,
        request.assume,
    )
    yield (
        f"rollout servers: {_servers(request)}; KV cache of {held:,.0f} tokens in each; pass rates "
        f"of 1,000 problems with {work.num_rollouts} rollouts each: {estimate / 60:.1f} min"
    )


def _servers(request: PlanRequest) -> str:
    """Number of the rollout servers, and the GPUs they take."""
    served = request.served
    of = f"{served.replicas} of {served.tensor} GPU{'s' if served.tensor > 1 else ''}"
    if request.server is not None:
        return f"{of}, on the trainer's first {served.gpus}"
    return f"{of}, {served.gpus} GPUs beside those counted here"


def assumption_lines(request: PlanRequest, work: Work) -> Iterator[str]:
    """Lines on the data sheet, the lengths and every other assumption behind a plan."""
    gpu = request.cluster.gpu
    yield (
        f"{gpu.name}: {gpu.bf16 / 1e12:.0f} bf16 and {gpu.fp8 / 1e12:.0f} fp8 TFLOP/s, "
        f"{gpu.hbm / 1e12:.2f} TB/s memory, {gpu.nvlink / 1e9:.0f} GB/s NVLink, "
        f"{gpu.network / 1e9:.0f} GB/s network and {gpu.pcie / 1e9:.0f} GB/s PCIe, each way "
        "(data sheets)"
    )
    yield from request.assume.lines()
    yield (
        f"tokens of a problem: memory for the longest, {work.prompt} (teacher "
        f"{work.teacher_prompt}) + {work.response}; time for "
        f"{work.mean_prompt:.0f} + {work.mean_response:.0f}"
        + (", packed" if work.packed else " in loss and rollouts, elsewhere padded to the longest")
    )
    yield (
        f"rollouts in {work.on_policy:.0%} of the steps; the one pass of a cached teacher over all "
        "stored responses is not counted"
    )
    yield "a projection: no figure here was measured on a GPU"


def candidates_table(candidates: Sequence[Candidate]) -> Table:
    """Table of layouts that fit, in the order given, with memory and time."""
    table = Table(title="layouts that fit, cheapest first", title_justify="left")
    for name in ("layout", "teacher", "micro-batch", "GiB a GPU", "s a step", "GPU-hours"):
        table.add_column(name, justify="left" if name in ("layout", "teacher") else "right")
    for candidate in candidates:
        table.add_row(
            describe_layout(candidate.layout),
            describe_teacher(candidate),
            str(candidate.work.micro_batch_size),
            _gib(candidate.needed),
            f"{candidate.time.total:.2f}",
            f"{candidate.gpu_hours:.1f}",
        )
    return table


def overrides(candidate: Candidate, gpus_per_node: int) -> list[str]:
    """Settings of a layout, as they are typed on the command line (``key=value``)."""
    layout, teacher = candidate.layout, candidate.teacher
    separate = teacher.layout.world_size if teacher.placement is TeacherPlacement.separate else 0
    ranks = layout.world_size + separate
    per_node = max(n for n in range(1, gpus_per_node + 1) if ranks % n == 0)
    settings: dict[str, object] = {
        "trainer.num_nodes": ranks // per_node,
        "trainer.devices": per_node,
        "model.tensor_model_parallel_size": layout.tensor,
        "model.pipeline_model_parallel_size": layout.pipeline,
        "model.context_parallel_size": layout.context,
        "model.expert_model_parallel_size": layout.expert,
        "model.sequence_parallel": str(layout.sequence_parallel).lower(),
        "model.micro_batch_size": candidate.work.micro_batch_size,
        "model.optim.use_distributed_optimizer": str(layout.distributed_optimizer).lower(),
        "model.virtual_pipeline_model_parallel_size": layout.virtual,
        "model.recompute_granularity": layout.recompute.value,
        "teacher.placement": teacher.placement.value,
        "teacher.separate_ranks": separate,
        "teacher.tensor_model_parallel_size": teacher.layout.tensor,
        "teacher.pipeline_model_parallel_size": teacher.layout.pipeline,
        "teacher.expert_model_parallel_size": teacher.layout.expert,
    }
    return [f"{key}={value}" for key, value in settings.items()]


def models_line(request: PlanRequest) -> str:
    student, teacher = model_parameters(request.student), model_parameters(request.teacher)
    return f"student {student / 1e9:.2f} B parameters, teacher {teacher / 1e9:.2f} B"


def describe(candidate: Candidate) -> str:
    return f"{describe_layout(candidate.layout)}, teacher {describe_teacher(candidate)}"


def describe_layout(layout: Layout) -> str:
    sizes = {
        "TP": layout.tensor,
        "PP": layout.pipeline,
        "VPP": layout.virtual,
        "CP": layout.context,
        "EP": layout.expert,
        "DP": layout.data,
    }
    text = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "1 GPU"
    extras = [
        *(["SP"] if layout.sequence_parallel else []),
        *(["distributed optimizer"] if layout.distributed_optimizer else []),
        *(
            [f"recompute {layout.recompute.value}"]
            if layout.recompute is not Recompute.none
            else []
        ),
    ]
    return ", ".join([text, *extras])


def describe_teacher(candidate: Candidate) -> str:
    plan = candidate.teacher
    if plan.placement is TeacherPlacement.cached:
        return plan.placement.value
    size = f"TP{plan.layout.tensor} PP{plan.layout.pipeline}"
    return f"{plan.placement.value} {size}{' fp8' if plan.fp8 else ''}"


def _gib(value: float) -> str:
    return f"{value / GIB:.1f}"


def _joined(parts: dict[str, str]) -> str:
    return " + ".join(f"{name} {value}" for name, value in parts.items())
