"""``nemo-paced plan``: memory, time and the cheapest layout, before a GPU is asked for."""

from __future__ import annotations

import argparse
from dataclasses import replace

from rich.console import Console

from nemo_paced.compose import Parser, with_config
from nemo_paced.config import PacedConfig, RolloutPlacement, TeacherPlacement
from nemo_paced.errors import ConfigError
from nemo_paced.hf.architectures import Architecture
from nemo_paced.sizing import report
from nemo_paced.sizing.flops import Server
from nemo_paced.sizing.hardware import GPUS, Assumptions, Cluster
from nemo_paced.sizing.search import (
    Candidate,
    PlanRequest,
    best_of_each_cut,
    divides,
    evaluate,
    fewest_gpus,
    search,
)
from nemo_paced.sizing.shapes import Accelerator, Work, student_layout, teacher_plan, work_of

SHOWN = 5  # layouts
MAX_GPUS = 1024  # that are tried without --nodes
# mean length over data.max_*: responses rarely reach their limit, prompts are a good deal shorter
MEAN_SHARE = 0.5


def main(arguments: list[str]) -> None:
    options, rest = _parser().parse_known_args(arguments)
    with_config(rest, lambda config: show(config, options, Console()))


def show(config: PacedConfig, options: argparse.Namespace, console: Console) -> None:
    """Print memory and time of the configured layout, and the cheapest layouts that fit.

    Raises:
        ConfigError: a config.json that is not there, an option that cannot be.
    """
    request, work = _problem(config, options)

    def say(text: str = "") -> None:
        console.print(text, highlight=False, soft_wrap=True)

    say(report.models_line(request))
    asked = _asked(config, options, request, work)
    if asked is not None:
        console.print(report.memory_table(asked, request))
        say(report.verdict(asked, request))
        for line in report.time_lines(asked, request):
            say(line)
    found = _search(config, options, request, work)
    say()
    if found:
        console.print(report.candidates_table(best_of_each_cut(found)[:SHOWN]))
        typed = " ".join(report.overrides(found[0], options.gpus_per_node))
        say(f"cheapest ({found[0].gpus} GPUs): {typed}")
    else:
        gpus = options.nodes * options.gpus_per_node if options.nodes else MAX_GPUS
        say(f"no layout of {gpus} GPUs fits: take more or larger ones, or shorter responses")
    say("\nAssumptions:")
    for line in report.assumption_lines(request, work):
        say(f"- {line}")


def _parser() -> Parser:
    parser = Parser("plan")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100")
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=float)
    parser.add_argument("--response-tokens", type=float)
    parser.add_argument("--mfu", type=float, default=Assumptions().training_mfu)
    return parser


def _problem(config: PacedConfig, options: argparse.Namespace) -> tuple[PlanRequest, Work]:
    data, rollout = config.data, config.rollout
    for name in ("gpus_per_node", "mfu", "nodes", "prompt_tokens", "response_tokens"):
        given = getattr(options, name)
        if given is not None and given <= 0:
            raise ConfigError(f"plan: --{name.replace('_', '-')} must be above 0")
    work = work_of(
        config,
        mean_prompt=options.prompt_tokens or MEAN_SHARE * data.max_prompt_length,
        mean_response=options.response_tokens or MEAN_SHARE * data.max_response_length,
        accelerator=Accelerator.gpu,
    )
    cluster = Cluster(GPUS[options.gpu], options.nodes or 1, options.gpus_per_node)
    server = Server(
        rollout.tensor_parallel_size,
        rollout.gpu_memory_utilization * cluster.gpu.memory,
        rollout.max_num_seqs,
        replicas=len(rollout.endpoints) or rollout.num_replicas,
    )
    colocated = rollout.placement is RolloutPlacement.colocated
    sampled = config.asks_student(resumed=False)
    request = PlanRequest(
        student=Architecture.read(config.student.hf_path, "student.hf_path"),
        teacher=Architecture.read(config.teacher_hf_path, "teacher.hf_path"),
        cluster=cluster,
        server=server if colocated and sampled else None,
        served=server,
        sampled=sampled,
        assume=replace(Assumptions(), training_mfu=options.mfu),
    )
    return request, work


def _asked(
    config: PacedConfig, options: argparse.Namespace, request: PlanRequest, work: Work
) -> Candidate | None:
    """The configuration's own layout; ``None`` where it does not divide the models."""
    layout = student_layout(config)
    teacher = teacher_plan(config)
    for shape, cut in ((request.student, layout), (request.teacher, teacher.layout)):
        if not divides(shape, cut.tensor, cut.pipeline * cut.virtual):
            return None
    return evaluate(request, layout, teacher, work)


def _search(
    config: PacedConfig, options: argparse.Namespace, request: PlanRequest, work: Work
) -> list[Candidate]:
    placements = [TeacherPlacement.colocated, TeacherPlacement.offloaded, TeacherPlacement.separate]
    if not work.on_policy:  # signals of fresh samples cannot be known before
        placements.append(TeacherPlacement.cached)
    fp8, where = teacher_plan(config).fp8, tuple(placements)
    if options.nodes:
        return search(request, work, gpus=request.cluster.gpus, fp8=fp8, placements=where)
    return fewest_gpus(request, work, limit=MAX_GPUS, fp8=fp8, placements=where)
