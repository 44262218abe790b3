"""Patches that let Megatron-Core run on CPU tensors under gloo; nothing else patches for good.

Megatron-Core names ``device="cuda"`` and ``torch.cuda.current_device()`` in many places. A torch
function mode turns such device arguments into the CPU; streams, events and synchronisation become
no-ops, the RNG tracker keeps the CPU generator's state, and kernels for GPUs that are installed are
left out. (A dry run at full size patches more for its time: ``preflight/dry_run/fake_tensors.py``.)
Nothing of this runs in a process that uses a GPU: ``parallel.groups.initialize`` calls
:func:`enable` for ``accelerator=cpu``, and for ``auto`` where torch sees no GPU. One name that
Megatron-Core leaves undefined is defined everywhere: :func:`define_missing_names`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from multiprocessing.context import ForkContext
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
_mode: TorchFunctionMode | None = None


def enable() -> None:
    """Patch this process for good, hiding GPUs from it; a second call does nothing."""
    global _mode
    if _mode is not None:
        return
    assert not torch.cuda.is_initialized(), "this process has used a GPU already"
    _patch_torch_cuda()
    _patch_rng_tracker()
    _patch_optimizers()
    _patch_experts()
    _patch_checkpoints()
    _mode = _CudaMeansCpu()
    _mode.__enter__()


def define_missing_names() -> None:
    """Define a name that the router of experts asks for and only Transformer Engine's import makes.

    Without Transformer Engine a layer of experts ends in a NameError, on a GPU too.
    """
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # the optimizer asserts on the name of a CUDA tensor type
            return func(*args).replace("torch.", "torch.cuda.")
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _NoStream:
    """Stand-in for a CUDA stream or event: everything has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or _NoStream()

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def _patch_torch_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.is_available = lambda: False
    cuda.device_count = lambda: 0
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.Stream = _NoStream
    cuda.Event = _NoStream
    cuda.current_stream = lambda device=None: _NoStream()
    cuda.default_stream = lambda device=None: _NoStream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.manual_seed = torch.random.default_generator.manual_seed
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()


def _patch_rng_tracker() -> None:
    from megatron.core.tensor_parallel import random

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> Any:
        return torch.get_rng_state()

    def set_state(new_state: Any, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    random._get_cuda_rng_state = get_state  # type: ignore[assignment]
    random._set_cuda_rng_state = set_state  # type: ignore[assignment]


def _patch_optimizers() -> None:
    """Put torch's Adam and Megatron's own sums in place of Transformer Engine's and Apex's kernels.

    Megatron binds those wherever they can be imported, and they take addresses on a GPU.
    """
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as mixed_precision

    for module in (clip_grads, mixed_precision):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    # Megatron-Core 0.19 keeps the norm on the GPU where it has this one
    clip_grads.multi_tensor_scale_tensor_impl = None  # type: ignore[attr-defined]
    optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.Adam = torch.optim.Adam  # what its constructor accepts beside AdamW
    distrib_optimizer.HAVE_APEX_OR_TE = False
    distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.USING_APEX_OPTIMIZER = False


def _patch_experts() -> None:
    """Let layers of experts run without Transformer Engine's GEMM and without copies from a GPU.

    The token dispatcher turns split sizes into numpy arrays as part of a copy from the GPU.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_host
    moe_utils.te_general_gemm = None


def _patch_checkpoints() -> None:
    """Fork, not spawn, the process that keeps what the writers of a checkpoint report.

    A spawned one imports torch to read the first report: two seconds of processor time of each
    rank at its first checkpoint. Writers are forked by Megatron as well.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def results_queue(mp_mode: str = "") -> Any:
        if filesystem_async._results_queue is None:
            manager = SyncManager(ctx=ForkContext())
            manager.start(initializer=_part_from_parent, initargs=(_open_descriptors(),))
            filesystem_async._results_queue = manager.Queue()
        return filesystem_async._results_queue

    # the second name is that of Megatron-Core 0.19
    for name in ("_get_write_results_queue", "get_write_results_queue"):
        if hasattr(filesystem_async, name):
            setattr(filesystem_async, name, results_queue)


def _open_descriptors() -> list[int]:
    """What this process has open beyond standard input, output and error."""
    return [number for entry in Path("/proc/self/fd").iterdir() if (number := int(entry.name)) > 2]


def _part_from_parent(inherited: list[int]) -> None:
    """Make a forked process end with the rank and keep nothing open that the rank had open.

    A socket that stayed open here would hide the rank's death from those that wait for it; the pipe
    to the rollout server's supervisor, the order to stop that closing it is.
    """
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in inherited:
        # replaced, not closed: objects of the rank that are collected here close their number
        os.dup2(nothing, descriptor)
