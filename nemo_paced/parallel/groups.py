"""Process groups of a run: built once from the configuration, then passed down as arguments.

Student and teacher have a :class:`Parallel` each. The student's groups are Megatron's global ones,
since some of its code falls back to those; the teacher's are made beside them when its layout
differs.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from nemo_paced.config import ModelConfig
from nemo_paced.errors import ConfigError
from nemo_paced.parallel import cpu_megatron
from nemo_paced.parallel.link import Link, split_world
from nemo_paced.parallel.messages import Messages

logger = logging.getLogger(__name__)

# Experts are whole: the narrow ones of today's models (768 columns) gain nothing from being cut,
# and the tensor-parallel ranks serve as expert-parallel or expert-data-parallel ones instead.
EXPERT_TENSOR_PARALLEL_SIZE = 1
# Megatron's order of ranks: tensor-parallel neighbours are next to each other, stages far apart
_ORDER = "tp-cp-ep-dp-pp"


@dataclass(frozen=True, slots=True)
class RankGrid:
    """Rank numbers of a layout, by arithmetic that every rank can do for all others.

    Attributes:
        tensor, context, data, pipeline: sizes of the layout's groups.
        first_rank: number of the layout's first rank.
    """

    tensor: int
    context: int
    data: int
    pipeline: int
    first_rank: int = 0

    def beginning_at(self, rank: int) -> RankGrid:
        """The same layout with its first rank numbered ``rank``."""
        return replace(self, first_rank=rank)

    def last_stage(self, dp_rank: int) -> list[int]:
        """Ranks of a data-parallel replica's last pipeline stage, indexed by tp + tensor * cp."""
        replica = dp_rank + self.data * (self.pipeline - 1)
        first = self.first_rank + self.tensor * self.context * replica
        return list(range(first, first + self.tensor * self.context))


@dataclass(frozen=True, slots=True)
class Parallel:
    """This rank's place in a parallel layout, with its process groups.

    Attributes:
        rank, world_size: of its world: where the teacher has ranks of its own (``link.py``), the
            student's and the teacher's ranks are counted apart.
        groups: Megatron's collection, for its models, schedules and optimizers.
        link: to the other world; ``None`` where student and teacher share their ranks.
    """

    rank: int
    world_size: int
    device: torch.device
    groups: ProcessGroupCollection
    link: Link | None = None

    @property
    def tp_group(self) -> ProcessGroup:
        return self.groups.tp

    @property
    def pp_group(self) -> ProcessGroup:
        return self.groups.pp

    @property
    def cp_group(self) -> ProcessGroup:
        return self.groups.cp

    @property
    def tp_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def tp_size(self) -> int:
        return self.groups.tp.size()

    @property
    def pp_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def pp_size(self) -> int:
        return self.groups.pp.size()

    @property
    def cp_rank(self) -> int:
        return self.groups.cp.rank()

    @property
    def cp_size(self) -> int:
        return self.groups.cp.size()

    @property
    def dp_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def dp_size(self) -> int:
        return self.groups.dp.size()

    @property
    def ep_rank(self) -> int:
        return self.groups.ep.rank()

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def messages(self) -> Messages:
        """Messages among the ranks of this world, without a collective."""
        return Messages.of_world()

    @property
    def grid(self) -> RankGrid:
        return RankGrid(self.tp_size, self.cp_size, self.dp_size, self.pp_size)


def initialize(
    model: ModelConfig,
    *,
    accelerator: str = "auto",
    timeout_s: float = 1800,
    teacher: ModelConfig | None = None,
    separate_ranks: int = 0,
) -> Parallel:
    """Join the job (torchrun's environment variables, or alone without them) and build all groups.

    Args:
        model: the student's layout.
        accelerator: ``auto``, ``gpu`` or ``cpu``.
        timeout_s: after which a collective counts as failed, seconds.
        teacher: the layout of the last ``separate_ranks`` ranks, which form a world of their own.

    Raises:
        ConfigError: the ranks do not fit the layout, or the accelerator is not there.
    """
    on_gpu = _on_gpu(accelerator)
    if not on_gpu:
        cpu_megatron.enable()
    cpu_megatron.define_missing_names()
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend, timeout = "nccl" if on_gpu else "gloo", timedelta(seconds=timeout_s)
    link, prefix = None, "model"
    if separate_ranks:
        link = split_world(separate_ranks, backend=backend, device=device, timeout=timeout)
        if link.is_teacher:
            assert teacher is not None, "separate ranks have a layout"
            model, prefix = teacher, "teacher"
    else:
        _join(backend=backend, timeout=timeout)
    _check_layout(model, torch.distributed.get_world_size(), prefix=prefix)
    chunks = model.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=model.context_parallel_size,
        expert_model_parallel_size=model.expert_model_parallel_size,
        expert_tensor_parallel_size=EXPERT_TENSOR_PARALLEL_SIZE,
        distributed_timeout_minutes=timeout_s / 60,  # type: ignore[arg-type]  # fractions work
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(model.seed)
    return Parallel(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        device=device,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        link=link,
    )


def beside(student: Parallel, layout: ModelConfig, *, timeout_s: float = 1800) -> Parallel:
    """Groups of the teacher's ``layout`` over the student's ranks; every rank must call it.

    Returns:
        ``student`` itself when the layout is the same.

    Raises:
        ConfigError: the ranks do not fit the layout.
    """
    grid = student.grid
    sizes = (
        layout.tensor_model_parallel_size,
        layout.context_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.expert_model_parallel_size,
    )
    if sizes == (grid.tensor, grid.context, grid.pipeline, student.groups.ep.size()):
        return student
    _check_layout(layout, student.world_size, prefix="teacher")
    groups = _make_groups(layout, student.world_size, timedelta(seconds=timeout_s))
    return Parallel(student.rank, student.world_size, student.device, groups)


def _make_groups(
    layout: ModelConfig, world_size: int, timeout: timedelta
) -> ProcessGroupCollection:
    """Groups that a frozen model and Megatron's forward schedule need; none for an optimizer."""
    tensor, pipeline = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    context, expert = layout.context_parallel_size, layout.expert_model_parallel_size
    dense = parallel_state.RankGenerator(
        tp=tensor,
        ep=1,
        dp=world_size // layout.model_parallel_size,
        pp=pipeline,
        cp=context,
        order=_ORDER,
    )
    experts = parallel_state.RankGenerator(
        tp=EXPERT_TENSOR_PARALLEL_SIZE,
        ep=expert,
        dp=world_size // layout.expert_layout_size,
        pp=pipeline,
        cp=1,
        order=_ORDER,
    )

    def group(enumeration: list[list[int]]) -> ProcessGroup:
        own, _ = torch.distributed.new_subgroups_by_enumeration(enumeration, timeout=timeout)
        return own

    def some_of(enumeration: list[list[int]]) -> ProcessGroup | None:
        """This rank's group of an enumeration that leaves ranks out; ``None`` for those."""
        mine = None
        for ranks in enumeration:
            made = torch.distributed.new_group(ranks, timeout=timeout)
            if torch.distributed.get_rank() in ranks:
                mine = made
        return mine

    stages = dense.get_ranks("pp")
    return ProcessGroupCollection(
        tp=group(dense.get_ranks("tp")),
        pp=group(stages),
        mp=group(dense.get_ranks("tp-pp")),
        cp=group(dense.get_ranks("cp")),
        tp_cp=group(dense.get_ranks("tp-cp")),
        dp=group(dense.get_ranks("dp")),
        dp_cp=group(dense.get_ranks("dp-cp")),
        tp_dp_cp=group(dense.get_ranks("tp-dp-cp")),
        embd=some_of([parallel_state.default_embedding_ranks(ranks) for ranks in stages]),
        pos_embd=some_of([[ranks[0]] for ranks in stages]),
        ep=group(experts.get_ranks("ep")),
        expt_tp=group(experts.get_ranks("tp")),
        tp_ep=group(experts.get_ranks("tp-ep")),
        tp_ep_pp=group(experts.get_ranks("tp-ep-pp")),
        expt_dp=group(experts.get_ranks("dp")),
    )


def shutdown() -> None:
    """Leave the job and destroy its process groups; safe to call twice."""
    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _on_gpu(accelerator: str) -> bool:
    available = torch.cuda.is_available()
    if accelerator == "gpu" and not available:
        raise ConfigError(
            "trainer.accelerator is gpu and torch sees no GPU: install a CUDA build of torch, or "
            "set trainer.accelerator=cpu"
        )
    return available and accelerator != "cpu"


def _join(backend: str, timeout: timedelta) -> None:
    if torch.distributed.is_initialized():
        return
    if "RANK" in os.environ:
        torch.distributed.init_process_group(backend, timeout=timeout)
    else:
        torch.distributed.init_process_group(
            backend, store=torch.distributed.HashStore(), rank=0, world_size=1, timeout=timeout
        )


def _check_layout(model: ModelConfig, world_size: int, *, prefix: str) -> None:
    ranks = model.model_parallel_size
    if world_size % ranks:
        raise ConfigError(
            f"{world_size} ranks were started, and {prefix}.tensor_model_parallel_size x "
            f"pipeline_model_parallel_size x context_parallel_size is {ranks}, which does not "
            "divide them"
        )
    if world_size % model.expert_layout_size:
        raise ConfigError(
            f"{world_size} ranks were started, and {prefix}.expert_model_parallel_size x "
            f"pipeline_model_parallel_size is {model.expert_layout_size}, which does not divide "
            "them"
        )
