"""Ours and the peers' losses behind one signature: inputs -> sum over tokens of the divergence.

Each peer is called as its own trainer calls it; only its reduction is undone. What cannot be
imported or built here is returned as :class:`Absent` with the reason, never replaced by another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from reference import Linear, Logits, plain_divergence

OURS = "nemo_paced"
# the betas of TRL and Liger: 0 is KL(T || S), 1 is KL(S || T), between them generalised JSD
BETAS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 0.5}
LIGER_DEFAULT_CHUNK = 1024
Total = Callable[[Logits | Linear], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Contender:
    """A loss to be measured.

    Attributes:
        form: ``logits`` (from logits of both models) or ``linear`` (from hidden states and heads).
        total: sum over tokens of the divergence, differentiable in the leaves of its inputs.
    """

    name: str
    form: str
    kind: str
    total: Total
    note: str = ""


@dataclass(frozen=True, slots=True)
class Absent:
    """A loss that could not be measured here, and why."""

    name: str
    form: str
    kind: str
    reason: str


def all_contenders(
    kinds: tuple[str, ...], device: torch.device, chunk_size: int | None
) -> list[Contender | Absent]:
    """Every loss of every kind it computes."""
    found: list[Contender | Absent] = []
    for kind in kinds:
        found += [
            _attempt(OURS, "logits", kind, _ours),
            Contender("plain PyTorch", "logits", kind, partial(_plain, kind), "casts to float32"),
            _attempt(OURS, "linear", kind, partial(_ours_fused, chunk_size)),
            *_ours_into_main_grad(chunk_size, kind),
            _attempt("nemo_paced, unfused", "linear", kind, _ours, "logits, then divergence()"),
            Contender("plain PyTorch", "linear", kind, partial(_plain, kind), "casts to float32"),
        ]
        if kind in BETAS:
            found += _peers(kind, device)
    return found


def _peers(kind: str, device: torch.device) -> list[Contender | Absent]:
    found = [
        _attempt(
            "TRL generalized_jsd_loss", "logits", kind, _trl, "computes in the dtype of the logits"
        ),
    ]
    if kind in ("forward_kl", "reverse_kl"):
        found.append(_modelopt(kind))
    found += _liger_chunked_losses(kind, device)
    triton = [
        ("Liger LigerJSD (Triton)", "logits", _liger_triton_jsd, kind),
        ("Liger LigerFusedLinearJSD (Triton)", "linear", _liger_triton_fused, kind),
    ]
    for name, form, build, kind_ in triton:
        if device.type == "cuda":
            found.append(_attempt(name, form, kind_, build))
        else:
            found.append(Absent(name, form, kind_, "its Triton kernels need a GPU"))
    return found


def _liger_chunked_losses(kind: str, device: torch.device) -> list[Contender | Absent]:
    """Liger's loss in plain PyTorch: at its default chunk, at a chunk like ours, and compiled."""
    name = "Liger LigerFusedLinearJSDLoss"
    found = [
        _attempt(f"{name}, chunk {chunk}", "linear", kind, partial(_liger_chunked, chunk, False))
        for chunk in (LIGER_DEFAULT_CHUNK, 64)
    ]
    if device.type == "cpu":
        reason = "torch.compile: not tried on the CPU"
        return [*found, Absent(f"{name}, compiled", "linear", kind, reason)]
    build = partial(_liger_chunked, LIGER_DEFAULT_CHUNK, True)
    return [*found, _attempt(f"{name}, compiled", "linear", kind, build)]


def _attempt(
    name: str, form: str, kind: str, build: Callable[[str], Total], note: str = ""
) -> Contender | Absent:
    try:
        return Contender(name, form, kind, build(kind), note)
    except Exception as error:  # whatever a peer raises at import is the reason it is absent
        return Absent(name, form, kind, describe(error))


def describe(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _ours(kind: str) -> Total:
    from nemo_paced.losses.divergence import divergence

    def total(inputs: Logits | Linear) -> torch.Tensor:
        logits = inputs.logits()
        return divergence(logits.student, logits.teacher, kind).sum()

    return total


def _ours_fused(chunk_size: int | None, kind: str) -> Total:
    from nemo_paced.losses.linear_divergence import linear_divergence

    def total(inputs: Linear) -> torch.Tensor:
        return linear_divergence(
            inputs.student_hidden,
            inputs.student_weight,
            inputs.teacher_hidden,
            inputs.teacher_weight,
            kind,
            inputs.student_hidden.new_ones(inputs.num_tokens, dtype=torch.float32),
            chunk_size=chunk_size,
        )

    return total


def _ours_into_main_grad(chunk_size: int | None, kind: str) -> list[Contender | Absent]:
    """Ours as the trainer calls it: off-policy, and on-policy with log-probabilities of targets."""
    name, note = f"{OURS}, into main_grad", "the head's gradient is added to a float32 buffer"
    off, on = (partial(_into_main_grad, chunk_size, targets) for targets in (False, True))
    return [
        _attempt(name, "linear", kind, off, note),
        _attempt(f"{name}, log-probs", "linear", kind, on, note),
    ]


def _into_main_grad(chunk_size: int | None, targets: bool, kind: str) -> Total:
    from nemo_paced.losses.linear_divergence import HiddenTeacher, linear_loss
    from nemo_paced.losses.options import Options

    def total(inputs: Linear) -> torch.Tensor:
        hidden, weight = inputs.student_hidden, inputs.student_weight
        if not hasattr(weight, "main_grad"):  # as Megatron's DDP makes it, once
            weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        rows = weight.shape[0], inputs.teacher_weight.shape[0]
        ids = torch.arange(inputs.num_tokens, device=hidden.device) if targets else None
        return linear_loss(
            hidden,
            weight,
            HiddenTeacher(inputs.teacher_hidden, inputs.teacher_weight),
            hidden.new_ones(inputs.num_tokens, dtype=torch.float32),
            Options.of(kind, rows, tp_group=None, vocab_size=None),
            chunk_size=chunk_size,
            targets_N=ids,
            # of the mean over tokens, which is what is differentiated
            gradient_scale=torch.full((), 1 / inputs.num_tokens, device=hidden.device),
        ).loss

    return total


def _plain(kind: str, inputs: Logits | Linear) -> torch.Tensor:
    logits = inputs.logits()
    if logits.student.dtype == torch.bfloat16:
        logits = Logits(logits.student.float(), logits.teacher.float())
    return plain_divergence(logits, kind).sum()


def _modelopt(kind: str) -> Contender | Absent:
    """The Megatron loss where Megatron-Core can be imported, else the Hugging Face one."""
    megatron = _attempt(
        "ModelOpt LogitsKLLoss", "logits", kind, _modelopt_megatron, "Megatron plugin at TP 1"
    )
    if isinstance(megatron, Contender) or kind != "forward_kl":
        return megatron
    other = _attempt(
        "ModelOpt LogitsDistillationLoss",
        "logits",
        kind,
        _modelopt_plain,
        f"in place of LogitsKLLoss ({megatron.reason}); computes in the dtype of the logits",
    )
    return other if isinstance(other, Contender) else megatron


def _modelopt_megatron(kind: str) -> Total:
    from megatron.core.transformer.transformer_config import TransformerConfig
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    loss = LogitsKLLoss(config, reverse=kind == "reverse_kl")

    def total(inputs: Logits) -> torch.Tensor:
        per_token, *_ = loss(inputs.student[:, None], inputs.teacher[:, None])  # [s, b, v]
        return per_token.sum()

    return total


def _modelopt_plain(kind: str) -> Total:
    from modelopt.torch.distill.losses import LogitsDistillationLoss

    assert kind == "forward_kl", "this class has no other direction"
    loss = LogitsDistillationLoss(reduction="none")
    return lambda inputs: loss(inputs.student, inputs.teacher).sum()


def _trl(kind: str) -> Total:
    from trl.experimental.gkd import GKDTrainer

    def total(inputs: Logits) -> torch.Tensor:
        return GKDTrainer.generalized_jsd_loss(
            inputs.student, inputs.teacher, beta=BETAS[kind], num_items_in_batch=1
        )

    return total


def _liger_chunked(chunk_size: int, compiled: bool, kind: str) -> Total:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=BETAS[kind],
        compiled=compiled,
        chunk_size=chunk_size,
    )
    return partial(_liger_linear_total, loss)


def _liger_triton_fused(kind: str) -> Total:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    return partial(_liger_linear_total, LigerFusedLinearJSD(jsd_beta=float(BETAS[kind])))


def _liger_linear_total(loss: torch.nn.Module, inputs: Linear) -> torch.Tensor:
    labels = torch.zeros(inputs.num_tokens, dtype=torch.long, device=inputs.student_hidden.device)
    mean = loss(
        inputs.student_hidden,
        inputs.student_weight,
        inputs.teacher_hidden,
        inputs.teacher_weight,
        labels,
    )
    return mean * inputs.num_tokens


def _liger_triton_jsd(kind: str) -> Total:
    from liger_kernel.transformers.jsd import LigerJSD

    loss = LigerJSD(beta=float(BETAS[kind]))

    def total(inputs: Logits) -> torch.Tensor:
        log_s = inputs.student.log_softmax(-1, dtype=torch.float32)
        log_t = inputs.teacher.log_softmax(-1, dtype=torch.float32)
        return loss(log_s, log_t) * inputs.num_tokens

    return total
