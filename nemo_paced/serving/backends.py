"""Choice of the transport of ``rollout.refit`` that a run can use."""

from __future__ import annotations

import importlib.util
import ipaddress
from collections.abc import Sequence

from nemo_paced.config import RefitBackend, RolloutConfig, RolloutPlacement
from nemo_paced.errors import ConfigError

ON_GPUS = (RefitBackend.ipc, RefitBackend.nccl, RefitBackend.nccl_m2n)
LOOPBACK = "127.0.0.1"


def choose_backend(config: RolloutConfig, gpus: int, hosts: Sequence[str]) -> RefitBackend:
    """The transport of ``rollout.refit``, with ``auto`` resolved.

    The trainer and ``rollout-server`` both decide by this.

    Args:
        gpus: how many GPUs this process sees.
        hosts: the servers' hosts; without GPUs, ``auto`` takes files only where all are loopback.

    Raises:
        ConfigError: the backend that was asked for lacks something, which is named.
    """
    backend, on_this_machine = config.refit, all(is_loopback(host) for host in hosts)
    if backend is RefitBackend.auto:
        if not gpus or not importable("vllm"):
            return RefitBackend.file if on_this_machine else RefitBackend.gloo
        if config.placement is RolloutPlacement.colocated:
            return RefitBackend.ipc
        return RefitBackend.nccl_m2n if importable("nccl.m2n") else RefitBackend.nccl
    lacking = []
    if backend in ON_GPUS and not gpus:
        lacking.append("a GPU (auto, file and gloo work without)")
    if backend in ON_GPUS and not importable("vllm"):
        lacking.append("vllm in the trainer's environment (pip install vllm; or file, gloo)")
    if backend is RefitBackend.nccl_m2n and not importable("nccl.m2n"):
        lacking.append("the packages nccl-extensions and nccl4py (or nccl)")
    if lacking:
        raise ConfigError(f"rollout.refit is {backend.value}, which needs {'; '.join(lacking)}")
    return backend


def may_share_memory(config: RolloutConfig) -> bool:
    """Whether the choice may be CUDA IPC, without looking for GPUs or packages."""
    if config.refit is RefitBackend.auto:
        return config.placement is RolloutPlacement.colocated
    return config.refit is RefitBackend.ipc


def is_loopback(host: str) -> bool:
    """Whether a host is ``localhost`` or a loopback IP address; other names are not looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def importable(package: str) -> bool:
    """Whether a package is installed; the parents of a dotted name are imported, it is not."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # a parent of the dotted name is missing
        return False
