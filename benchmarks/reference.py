"""The divergences as one would write them in plain PyTorch, and the inputs they are measured on.

In float64 these formulas are what every contender is checked against; in float32 they are a
contender themselves. Axes: N tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

BLOCK = 8192  # columns of the vocabulary that are held in float64 at once
KINDS = ("forward_kl", "reverse_kl", "jsd", "adaptive_kl")


@dataclass(frozen=True, slots=True)
class Logits:
    """Logits [N, V] of both models."""

    student: torch.Tensor
    teacher: torch.Tensor

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        """What a gradient is taken of."""
        return (self.student,)

    @property
    def num_tokens(self) -> int:
        return self.student.shape[0]

    def logits(self) -> Logits:
        return self

    def first(self, tokens: int) -> Logits:
        """The first tokens, with leaves of their own."""
        return Logits(_leaf(self.student[:tokens]), self.teacher[:tokens])

    def exact_logits(self) -> Logits:
        """In float64, a leaf."""
        return Logits(_leaf(self.student.double()), self.teacher.double())

    def differences(
        self, gradients: tuple[torch.Tensor, ...], exact_NV: torch.Tensor
    ) -> list[tuple[float, float]]:
        """Of each leaf's gradient from the float64 one of the logits, and that one's largest."""
        return [_difference(gradients[0], exact_NV)]


@dataclass(frozen=True, slots=True)
class Linear:
    """Final hidden states [N, H] and LM heads [V, H] of both models."""

    student_hidden: torch.Tensor
    student_weight: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        return self.student_hidden, self.student_weight

    @property
    def num_tokens(self) -> int:
        return self.student_hidden.shape[0]

    def logits(self) -> Logits:
        with torch.no_grad():
            teacher = self.teacher_hidden @ self.teacher_weight.t()
        return Logits(self.student_hidden @ self.student_weight.t(), teacher)

    def first(self, tokens: int) -> Linear:
        return replace(
            self,
            student_hidden=_leaf(self.student_hidden[:tokens]),
            student_weight=_leaf(self.student_weight),
            teacher_hidden=self.teacher_hidden[:tokens],
        )

    def exact_logits(self) -> Logits:
        student = _exact_product(self.student_hidden.detach(), self.student_weight.detach())
        return Logits(_leaf(student), _exact_product(self.teacher_hidden, self.teacher_weight))

    def differences(
        self, gradients: tuple[torch.Tensor, ...], exact_NV: torch.Tensor
    ) -> list[tuple[float, float]]:
        """Block by block of the vocabulary: a float64 copy of a head would take gigabytes."""
        hidden_NH = torch.zeros_like(gradients[0], dtype=torch.float64)
        blocks = []
        for begin in range(0, exact_NV.shape[1], BLOCK):
            columns = slice(begin, begin + BLOCK)
            exact_NB = exact_NV[:, columns]
            hidden_NH += exact_NB @ self.student_weight[columns].detach().double()
            weight_BH = exact_NB.t() @ self.student_hidden.detach().double()
            blocks.append(_difference(gradients[1][columns], weight_BH))
        worst, largest = (max(numbers) for numbers in zip(*blocks, strict=True))
        return [_difference(gradients[0], hidden_NH), (worst, largest)]


def _leaf(values: torch.Tensor) -> torch.Tensor:
    return values.detach().requires_grad_()


def _exact_product(hidden_NH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
    """Logits [N, V] in float64."""
    hidden = hidden_NH.double()
    return torch.cat([hidden @ block_BH.double().t() for block_BH in weight_VH.split(BLOCK)], 1)


def _difference(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    return (got.double() - want).abs().max().item(), want.abs().max().item()


def make_logits(tokens: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Logits:
    """A teacher with logits of standard deviation 3 and a student near it."""
    generator = torch.Generator(device).manual_seed(0)
    teacher = torch.randn(tokens, vocab, generator=generator, device=device).mul_(3)
    student = torch.randn(tokens, vocab, generator=generator, device=device).add_(teacher)
    return Logits(student.to(dtype).requires_grad_(), teacher.to(dtype))


def make_linear(
    tokens: int, vocab: int, hidden: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Linear:
    """Student and teacher of these hidden sizes, logits of standard deviation 3."""
    generator = torch.Generator(device).manual_seed(1)

    def normal(rows: int, width: int, deviation: float) -> torch.Tensor:
        values = torch.randn(rows, width, generator=generator, device=device)
        return values.mul_(deviation).to(dtype)

    student, teacher = hidden
    return Linear(
        normal(tokens, student, 1.0).requires_grad_(),
        normal(vocab, student, 3 / student**0.5).requires_grad_(),
        normal(tokens, teacher, 1.0),
        normal(vocab, teacher, 3 / teacher**0.5),
    )


def plain_divergence(logits: Logits, kind: str) -> torch.Tensor:
    """Divergence of each token, [N], in the dtype of the logits."""
    log_s = logits.student.log_softmax(-1)
    log_t = logits.teacher.log_softmax(-1)
    t, s = log_t.exp(), log_s.exp()
    if kind == "forward_kl":
        return (t * (log_t - log_s)).sum(-1)
    if kind == "reverse_kl":
        return (s * (log_s - log_t)).sum(-1)
    if kind == "jsd":
        log_m = ((t + s) / 2).log()
        return (t * (log_t - log_m) + s * (log_s - log_m)).sum(-1) / 2
    if kind == "adaptive_kl":
        share = _head_share(t, s.detach())
        forward_kl = (t * (log_t - log_s)).sum(-1)
        return share * forward_kl + (1 - share) * (s * (log_s - log_t)).sum(-1)
    raise ValueError(f"kind is {kind!r}: one of {', '.join(KINDS)}")


def _head_share(t: torch.Tensor, s: torch.Tensor, head_mass: float = 0.5) -> torch.Tensor:
    """Share of the head in the sum of |T - S|: adaptive KL's weight of forward KL, [N]."""
    ordered, order = t.sort(dim=-1, descending=True, stable=True)
    in_head = ordered.cumsum(-1) <= head_mass
    in_head[:, 0] = True
    gap = (t - s).abs().gather(-1, order)
    return (gap * in_head).sum(-1) / gap.sum(-1)
