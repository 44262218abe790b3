"""Kinds of divergence between teacher T and student S, and a kind with its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class DivergenceKind(Enum):
    """Divergence between teacher T and student S that a stage minimises."""

    forward_kl = "forward_kl"  # KL(T || S)
    reverse_kl = "reverse_kl"  # KL(S || T)
    jsd = "jsd"  # b KL(T || M) + (1-b) KL(S || M), M = b T + (1-b) S, b = loss.jsd_beta
    skew_forward_kl = "skew_forward_kl"  # KL(T || a T + (1-a) S), a = loss.skew
    skew_reverse_kl = "skew_reverse_kl"  # KL(S || a S + (1-a) T)
    adaptive_kl = "adaptive_kl"  # both KLs, mixed at each token by the gaps over head and tail


# kinds that are a fixed sum of both KLs: shares of forward and of reverse KL
KL_SHARES = {
    DivergenceKind.forward_kl: (1.0, 0.0),
    DivergenceKind.reverse_kl: (0.0, 1.0),
}


# without slots, so that settings/stages.py can read the defaults from the class
@dataclass(frozen=True)
class Divergence:
    """A kind of divergence between next-token distributions, with its parameters.

    Skewed KLs are those of arXiv 2402.03898, adaptive KL is (g_head forward_kl + g_tail reverse_kl)
    / (g_head + g_tail) of arXiv 2404.02657.

    Attributes:
        kind: a :class:`DivergenceKind` or its value.
        temperature: what the logits of both models are divided by; no temperature^2 is multiplied
            back.
        jsd_beta: share of the teacher in the mixture of jsd.
        skew: share of the first distribution in the mixture of the skewed KLs.
        akl_head_mass: probability mass of the teacher's head in adaptive_kl.

    Raises:
        ValueError: a parameter out of its range.
    """

    kind: DivergenceKind
    temperature: float = 1.0
    jsd_beta: float = 0.5
    skew: float = 0.1
    akl_head_mass: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", DivergenceKind(self.kind))
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}: it must be above 0")
        for name in ("jsd_beta", "skew", "akl_head_mass"):
            share = getattr(self, name)
            if not 0 < share < 1:
                raise ValueError(f"{name} is {share}: it must lie between 0 and 1")

    @classmethod
    def of(cls, kind: Divergence | DivergenceKind | str) -> Divergence:
        """A divergence as it is, or the one of a kind with the default parameters."""
        return kind if isinstance(kind, cls) else cls(DivergenceKind(kind))

    @property
    def needs_forward_kl(self) -> bool:
        return self._kl_shares[0] > 0

    @property
    def needs_reverse_kl(self) -> bool:
        return self._kl_shares[1] > 0

    @property
    def needs_both_kls(self) -> bool:
        return self.needs_forward_kl and self.needs_reverse_kl

    @property
    def is_mixture(self) -> bool:
        """Whether the kind compares distributions with a mixture M of both."""
        return not (self.needs_forward_kl or self.needs_reverse_kl)

    @property
    def _kl_shares(self) -> tuple[float, float]:
        if self.kind is DivergenceKind.adaptive_kl:
            return (0.5, 0.5)  # both are above 0; each token has shares of its own
        return KL_SHARES.get(self.kind, (0.0, 0.0))

    @property
    def mixture_shares(self) -> tuple[float, float]:
        """Shares of teacher and student in the mixture M; of kinds that have one."""
        share_t = {
            DivergenceKind.jsd: self.jsd_beta,
            DivergenceKind.skew_forward_kl: self.skew,
            DivergenceKind.skew_reverse_kl: 1 - self.skew,
        }[self.kind]
        return share_t, 1 - share_t
