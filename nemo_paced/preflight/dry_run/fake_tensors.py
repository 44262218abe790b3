"""Torch and Megatron on fake tensors, as a GPU would run them: every patch of the full-size run.

Fake tensors have a shape, a type and a storage of the right size, and no values. Whatever reads a
value is answered or kept out of their mode here; whatever a GPU computes in one kernel is put in
place of what a CPU computes in several (``gpu_kernels.py``). All of it is undone at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.distributed_c10d as c10d
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import layers
from megatron.core.transformer import attention
from megatron.core.transformer.moe import token_dispatcher
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from nemo_paced.data import packing
from nemo_paced.hf import model
from nemo_paced.hf.directory import load_hf_config
from nemo_paced.losses import divergence, linear_divergence, topk
from nemo_paced.losses.chunks import tokens_of_chunk
from nemo_paced.preflight.dry_run import gpu_kernels
from nemo_paced.teacher.fp8.linear import RowScaled
from nemo_paced.training import setup

# pickled collectives, whose buffers a process reads
_OF_OBJECTS = (
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "scatter_object_list",
)


@contextmanager
def like_a_gpu() -> Iterator[None]:
    """Context in which all tensors are fake and layers and losses keep what they do on a GPU."""
    routing, aten = _EvenRouting(), torch.ops.aten
    with ExitStack() as stack:
        for owner, name, value in (*_gpu_kernels(), *_megatron_and_ours(routing), *_torch()):
            stack.enter_context(replaced(owner, name, value))
        # operators whose results depend on values
        stack.enter_context(_answered(aten._local_scalar_dense.default, _scalar))
        stack.enter_context(_answered(aten.masked_select.default, routing.select))
        stack.enter_context(torch.random.fork_rng(devices=()))
        # what is left to be compiled (residual additions) has no temporaries anyway
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def _gpu_kernels() -> Iterator[tuple[Any, str, Any]]:
    yield model, "RMSNorm", gpu_kernels.FusedRMSNorm
    yield model, "CoreAttention", gpu_kernels.FlashAttention
    # the layers' stand-ins are made from Megatron's local ones
    yield model, "has_transformer_engine", lambda: False
    yield model, "_tell_layers", lambda transformer_engine: None
    yield attention, "apply_rotary_pos_emb", gpu_kernels.rotated
    yield fused_bias_swiglu, "swiglu", gpu_kernels.swiglu
    yield fused_bias_swiglu, "swiglu_back", gpu_kernels.swiglu_back
    yield fused_bias_swiglu, "weighted_swiglu", gpu_kernels.swiglu
    yield fused_bias_swiglu, "weighted_swiglu_back", gpu_kernels.weighted_swiglu_back
    for module in (divergence, linear_divergence, topk):
        yield module, "kernels_for", lambda logits: gpu_kernels.LOSS
    yield divergence, "adaptive_kl_for", lambda logits: gpu_kernels.ADAPTIVE_KL
    yield linear_divergence, "_add_product", gpu_kernels.in_place
    yield linear_divergence, "tokens_of_chunk", _tokens_of_chunk
    yield RowScaled, "of", staticmethod(gpu_kernels.quantized)


def _tokens_of_chunk(width: int, *, on_gpu: bool) -> int:
    return tokens_of_chunk(width, on_gpu=True)


def _megatron_and_ours(routing: _EvenRouting) -> Iterator[tuple[Any, str, Any]]:
    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
    yield dispatcher, "__init__", _outside(dispatcher.__init__)  # orders of experts, as numbers
    yield dispatcher, "preprocess", routing.counting(dispatcher.preprocess)
    yield token_dispatcher, "maybe_move_tensor_to_cpu", _outside(_numbers)
    # Megatron keeps one buffer for all that is gathered along a sequence, Transformer Engine none
    yield layers, "get_global_memory_buffer", lambda: SimpleNamespace(get_tensor=_new_buffer)
    # several collectives in one call have no form for fake tensors
    yield param_and_grad_buffer, "_coalescing_manager", _one_by_one
    yield clip_grads, "l2_norm_impl", gpu_kernels.norm_of_all
    yield clip_grads, "multi_tensor_scale_impl", gpu_kernels.in_place
    # context parallelism looks for the tokens that a rank holds
    yield packing, "_micro_batch", _outside(packing._micro_batch)
    yield setup, "tokenizer_vocab_size", lambda hf_dir: load_hf_config(hf_dir)["vocab_size"]


def _numbers(tensor: Any, *_: Any, **__: Any) -> Any:
    return tensor.numpy() if torch.is_tensor(tensor) else tensor


def _new_buffer(shape: Any, dtype: torch.dtype, name: str) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype)


@contextmanager
def _one_by_one(*_: Any, **__: Any) -> Iterator[Any]:
    yield SimpleNamespace(wait=lambda: None)


def _torch() -> Iterator[tuple[Any, str, Any]]:
    yield torch.nn.Module, "to", lambda module, *_, **__: module  # fake tensors refuse to be moved
    # of an H100, which has FP8
    yield torch.cuda, "get_device_capability", lambda device=None: (9, 0)
    for module in (torch.distributed, c10d):
        for name in _OF_OBJECTS:
            yield module, name, _outside(getattr(module, name))


def _outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on real tensors, outside the mode of the fake ones."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return run


class _EvenRouting:
    """A routing that gives all experts alike, in place of the values that a router would find.

    Counts of tokens by expert and rank become the sizes of messages and of the experts' inputs, so
    they are real numbers, from real tensors outside the mode of the fake ones.
    """

    def __init__(self) -> None:
        self._selected = 0  # pairs of a token and one of its experts on this rank

    def counting(self, preprocess: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's ``preprocess`` on such a routing."""

        @wraps(preprocess)
        def count(dispatcher: Any, routing_map: torch.Tensor) -> Any:
            (tokens, experts), top_k = routing_map.shape, dispatcher.config.moe_router_topk
            self._selected = tokens * top_k
            with unset_fake_temporarily():
                chosen = torch.arange(self._selected).view(tokens, top_k) % experts
                even = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, chosen, True)
                return preprocess(dispatcher, even)

        return count

    def select(self, mode: Any, func: Any, values: torch.Tensor, mask: torch.Tensor) -> Any:
        """``masked_select`` by the mask of the experts that tokens go to."""
        return values.new_empty(self._selected)


def _scalar(mode: FakeTensorMode, func: Any, tensor: torch.Tensor) -> bool | int | float:
    """A value that a step takes for sound: conditions hold, sums are one."""
    if tensor.dtype is torch.bool:
        return True
    return 1.0 if tensor.dtype.is_floating_point else 1


@contextmanager
def _answered(operator: Any, answer: Callable[..., Any]) -> Iterator[None]:
    table = fake_impls.op_implementations_dict
    before = table[operator]
    table[operator] = answer
    try:
        yield
    finally:
        table[operator] = before


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner)[name]  # a static method as such
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
