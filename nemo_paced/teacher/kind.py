"""Kind of a run's teacher signal, and its bytes a token; this module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SignalKind:
    """Kind of signal that crosses from teacher to loss: final hidden states, or a top-k.

    Attributes:
        top_k: tokens of the top-k at each position; 0: hidden states, from which the loss is exact.
        temperature: of the distribution that a top-k is cut from.
        vocab_size: tokens of the true vocabulary.
    """

    top_k: int
    temperature: float
    vocab_size: int

    def identity(self) -> dict[str, float]:
        """Settings that decide a signal beyond the model; hidden states depend on none."""
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
            hidden_size: numbers of a hidden state.
            itemsize: bytes of one of them.
        """
        if self.top_k:  # float32 log-probability and int32 id of each, float32 of the tail
            return self.top_k * (4 + 4) + 4
        return hidden_size * itemsize
