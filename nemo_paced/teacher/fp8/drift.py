"""Drift of an FP8 teacher: change of its distributions and of the gradient that a student gets.

The hidden states in full precision and those in FP8 go through the teacher's one LM head (it
stays in BF16), with the vocabulary-parallel losses of the training step, so that the figures are
those that training sees.
No logits exist beyond a chunk of tokens.

Axes: N response tokens, V this rank's columns of the vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup

from nemo_paced.losses.kinds import Divergence, DivergenceKind
from nemo_paced.losses.linear_divergence import default_chunk, linear_divergence
from nemo_paced.losses.topk import TopKTeacher

TINY = 1e-300  # in place of a norm of 0, to divide by


@dataclass(frozen=True, slots=True)
class Drift:
    """Drift between the exact and the quantised teacher over some response tokens.

    Attributes:
        kl_N: float32 on the CPU, KL(exact || quantised) of each token, nats.
        same_top1: number of tokens whose likeliest next token is the same.
        exact_sq, quantized_sq, difference_sq: squared norms of the gradients with respect to the
            student's hidden states, and of their difference.
    """

    kl_N: torch.Tensor
    same_top1: int
    exact_sq: float
    quantized_sq: float
    difference_sq: float

    @staticmethod
    def total(parts: Sequence[Drift]) -> Drift:
        """The drift over the tokens of all parts together."""
        return Drift(
            torch.cat([torch.zeros(0), *(part.kl_N for part in parts)]),
            sum(part.same_top1 for part in parts),
            sum(part.exact_sq for part in parts),
            sum(part.quantized_sq for part in parts),
            sum(part.difference_sq for part in parts),
        )

    def figures(self) -> dict[str, Any]:
        """The fields of a certificate (``certificate.py``) that follow from this drift."""
        kl_N = self.kl_N.double()
        # a student that equals its teacher already has no gradient
        norms = max((self.exact_sq * self.quantized_sq) ** 0.5, TINY)
        cosine = (self.exact_sq + self.quantized_sq - self.difference_sq) / (2 * norms)
        return {
            "tokens": len(kl_N),
            "kl_mean": kl_N.mean().item(),
            "kl_median": kl_N.quantile(0.5).item(),
            "kl_p99": kl_N.quantile(0.99).item(),
            "kl_max": kl_N.max().item(),
            "top1_agreement": self.same_top1 / len(kl_N),
            "gradient_difference": (self.difference_sq / max(self.exact_sq, TINY)) ** 0.5,
            "gradient_cosine": cosine,
        }


@dataclass(frozen=True, slots=True)
class DriftMeter:
    """Meter of drift, from both models' LM heads [V, H] and the divergence of training.

    Attributes:
        vocab_size: tokens of the true vocabulary, over all ranks.
        chunk_size: tokens whose logits exist at a time; ``None``: chosen by the loss.
    """

    teacher_head_VH: torch.Tensor
    student_head_VH: torch.Tensor
    divergence: Divergence
    tp_group: ProcessGroup
    vocab_size: int
    chunk_size: int | None

    def measure(
        self,
        exact_NH: torch.Tensor,
        quantized_NH: torch.Tensor,
        student_NH: torch.Tensor,
        token_weights_N: torch.Tensor,
    ) -> Drift:
        """Drift over N tokens; collective over the tensor-parallel group.

        Args:
            exact_NH, quantized_NH: the teacher's final hidden states in full precision and in FP8.
            student_NH: the student's.
            token_weights_N: float32, as in the training loss.
        """
        device = self.teacher_head_VH.device
        exact_NH, quantized_NH = exact_NH.to(device), quantized_NH.to(device)
        exact, quantized = (
            self._student_gradient(student_NH.to(device), teacher_NH, token_weights_N)
            for teacher_NH in (exact_NH, quantized_NH)
        )
        same_N = self._likeliest(exact_NH) == self._likeliest(quantized_NH)
        return Drift(
            kl_N=self._kl(exact_NH, quantized_NH).cpu(),
            same_top1=int(same_N.sum()),
            exact_sq=exact.square().sum().item(),
            quantized_sq=quantized.square().sum().item(),
            difference_sq=(exact - quantized).square().sum().item(),
        )

    @torch.no_grad()
    def _kl(self, exact_NH: torch.Tensor, quantized_NH: torch.Tensor) -> torch.Tensor:
        head_VH = self.teacher_head_VH
        _, kl_N = linear_divergence(
            quantized_NH,
            head_VH,
            exact_NH,
            head_VH,
            Divergence(DivergenceKind.forward_kl, temperature=self.divergence.temperature),
            exact_NH.new_ones(len(exact_NH), dtype=torch.float32),
            tp_group=self.tp_group,
            vocab_size=self.vocab_size,
            chunk_size=self.chunk_size,
            return_per_token=True,
        )
        return kl_N

    def _student_gradient(
        self, student_NH: torch.Tensor, teacher_NH: torch.Tensor, token_weights_N: torch.Tensor
    ) -> torch.Tensor:
        """Gradient of the training loss by the student's hidden states: float64 [N, H]."""
        student_NH = student_NH.detach().requires_grad_()
        with torch.enable_grad():
            loss = linear_divergence(
                student_NH,
                self.student_head_VH.detach(),
                teacher_NH,
                self.teacher_head_VH,
                self.divergence,
                token_weights_N,
                tp_group=self.tp_group,
                vocab_size=self.vocab_size,
                chunk_size=self.chunk_size,
            )
            (gradient_NH,) = torch.autograd.grad(loss, student_NH)
        return gradient_NH.double()

    def _likeliest(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        top = TopKTeacher.from_hidden(
            hidden_NH,
            self.teacher_head_VH,
            1,
            chunk_size=self.chunk_size or default_chunk(self.teacher_head_VH),
            tp_group=self.tp_group,
            vocab_size=self.vocab_size,
        )
        return top.ids[:, 0]
