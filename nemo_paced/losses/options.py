"""Which divergence is computed, and how: what every kernel of this folder is told."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch.distributed import ProcessGroup


class Divergence(Enum):
    """What is minimised between teacher T and student S; M is a mixture of both.

    forward_kl       KL(T || S)
    reverse_kl       KL(S || T)
    jsd              b KL(T || M) + (1-b) KL(S || M),  M = b T + (1-b) S,  b = jsd_beta
    skew_forward_kl  KL(T || a T + (1-a) S),  a = skew                      (arXiv 2402.03898)
    skew_reverse_kl  KL(S || a S + (1-a) T)
    adaptive_kl      (g_head forward_kl + g_tail reverse_kl) / (g_head + g_tail)  (arXiv 2404.02657)
    """

    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    jsd = "jsd"
    skew_forward_kl = "skew_forward_kl"
    skew_reverse_kl = "skew_reverse_kl"
    adaptive_kl = "adaptive_kl"


@dataclass(frozen=True, slots=True)
class Options:
    """A divergence with its parameters, and this rank's part of the vocabulary.

    Attributes:
        valid: columns of this rank that belong to the true vocabulary.
        block_rows: rows of a block that stays in cache; ``None``: chosen by width and device.
    """

    kind: Divergence
    tp_group: ProcessGroup | None
    temperature: float
    jsd_beta: float
    skew: float
    akl_head_mass: float
    valid: int
    block_rows: int | None

    @property
    def needs_forward_kl(self) -> bool:
        return self.kind in (Divergence.forward_kl, Divergence.adaptive_kl)

    @property
    def needs_reverse_kl(self) -> bool:
        return self.kind in (Divergence.reverse_kl, Divergence.adaptive_kl)

    @property
    def is_mixture(self) -> bool:
        return not (self.needs_forward_kl or self.needs_reverse_kl)

    @property
    def mixture_shares(self) -> tuple[float, float]:
        """Shares of teacher and student in M."""
        share_t = {
            Divergence.jsd: self.jsd_beta,
            Divergence.skew_forward_kl: self.skew,
            Divergence.skew_reverse_kl: 1 - self.skew,
        }[self.kind]
        return share_t, 1 - share_t
