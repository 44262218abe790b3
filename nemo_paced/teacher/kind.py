"""Which of the two teacher signals a run has, and what a token of it costs; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SignalKind:
    """What crosses from teacher to loss.

    Attributes:
        top_k: tokens of the top-k; 0: final hidden states, from which the loss is exact.
        temperature: of the distribution that a top-k is cut from.
        vocab_size: the true vocabulary.
    """

    top_k: int
    temperature: float
    vocab_size: int

    def identity(self) -> dict[str, float]:
        """What decides a signal beyond the model: hidden states depend on nothing else."""
        if not self.top_k:
            return {"top_k": 0}
        return {
            "top_k": self.top_k,
            "temperature": self.temperature,
            "vocab_size": self.vocab_size,
        }

    def bytes_per_token(self, hidden_size: int, itemsize: int) -> int:
        """Bytes of the signal of one response token, in memory as on disk.

        Args:
            hidden_size, itemsize: of a hidden state, and bytes of one of its numbers.
        """
        if self.top_k:  # float32 log-probability and int32 id of each, float32 of the tail
            return self.top_k * (4 + 4) + 4
        return hidden_size * itemsize
