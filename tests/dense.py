"""The naive formulas in float64 over the dense vocabulary: what the losses are checked against."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from nemo_paced.losses.kinds import Divergence, DivergenceKind

KINDS = tuple(kind.value for kind in DivergenceKind)


def of_kind(kind: str, options: dict[str, Any]) -> tuple[Divergence, dict[str, Any]]:
    """The divergence with those of the options that are its parameters, and the other options."""
    names = {field.name for field in fields(Divergence)}
    parameters = {name: value for name, value in options.items() if name in names}
    others = {name: value for name, value in options.items() if name not in names}
    return Divergence(DivergenceKind(kind), **parameters), others


def dense_divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    kind: str,
    *,
    temperature: float = 1.0,
    jsd_beta: float = 0.5,
    skew: float = 0.1,
    akl_head_mass: float = 0.5,
) -> torch.Tensor:
    """Per-token divergence of float64 logits [N, V] over the true vocabulary."""
    log_s = torch.log_softmax(student.double() / temperature, -1)
    log_t = torch.log_softmax(teacher.double() / temperature, -1)
    s, t = log_s.exp(), log_t.exp()

    def kl(p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        return (p * torch.where(p > 0, p.log() - log_q, 0.0)).sum(-1)

    def mix(a: float) -> torch.Tensor:
        return (a * t + (1 - a) * s).clamp_min(1e-300).log()

    if kind == "forward_kl":
        return kl(t, log_s)
    if kind == "reverse_kl":
        return (s * (log_s - log_t)).sum(-1)
    if kind == "jsd":
        m = mix(jsd_beta)
        return jsd_beta * kl(t, m) + (1 - jsd_beta) * (s * (log_s - m)).sum(-1)
    if kind == "skew_forward_kl":
        return kl(t, mix(skew))
    if kind == "skew_reverse_kl":
        return (s * (log_s - mix(1 - skew))).sum(-1)
    assert kind == "adaptive_kl", f"{kind}: write its naive formula here"
    head = dense_head(t, akl_head_mass)
    gap = (t - s).abs().detach()
    g_head, g_tail = (gap * head).sum(-1), (gap * ~head).sum(-1)
    total = (g_head + g_tail).clamp_min(1e-300)
    forward, reverse = kl(t, log_s), (s * (log_s - log_t)).sum(-1)
    return (g_head * forward + g_tail * reverse) / total


def dense_head(t: torch.Tensor, head_mass: float) -> torch.Tensor:
    """Tokens by falling teacher probability (stable: ties by lower id) up to ``head_mass``."""
    values, order = torch.sort(t, dim=-1, descending=True, stable=True)
    taken = values.cumsum(-1) <= head_mass
    taken[..., 0] = True
    return torch.zeros_like(taken).scatter(-1, order, taken)


def make_logits(
    case: str, num_tokens: int, width: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Student and teacher float32 logits [N, V] of a named kind of input."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(num_tokens, width, generator=generator)
    teacher = torch.randn(num_tokens, width, generator=generator)
    if case == "peaked":
        return student * 50, teacher * 50
    if case == "equal":
        return student, student.clone()
    if case == "tied":
        return student, (teacher * 2).round() / 2
    if case == "offset":
        return student + 1e4, teacher + 1e4
    if case == "bf16":
        return student.bfloat16(), teacher.bfloat16()
    assert case == "random", case
    return student, teacher
