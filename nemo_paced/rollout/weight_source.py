"""The sharded student as a ``WeightSource`` of vLLM's weight-transfer interface.

Structurally vLLM's class, without importing vLLM: trainer and server may live in different
environments. A test holds it to the real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nemo_paced.hf.export_weights import iter_hf_tensors
from nemo_paced.hf.model import PacedGPTModel
from nemo_paced.parallel import Parallel


@dataclass(frozen=True, slots=True)
class ParamMeta:
    """Name, dtype on the wire, and whole shape of one Hugging Face parameter."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class MegatronWeightSource:
    """Hugging Face names and tensors of a Megatron model, walked in the table's order.

    Iterating is collective over the ranks that hold a part, in lockstep; rank 0 alone receives the
    tensors. Every pass is fresh: it reads the weights as they are.
    """

    def __init__(self, gpt: PacedGPTModel, parallel: Parallel) -> None:
        self.gpt = gpt
        self.parallel = parallel
        self.dtype = next(gpt.parameters()).dtype

    def metadata(self) -> list[ParamMeta]:
        """Of the whole model, on every rank, without moving anything."""
        architecture = self.gpt.architecture
        return [
            ParamMeta(name.format(layer=layer), self.dtype, shape)
            for row, layer in architecture.rows()
            for name, shape in zip(row.hf, architecture.hf_shapes(row), strict=True)
        ]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        return iter_hf_tensors(self.gpt, self.parallel)

    def held_names(self) -> set[str] | None:
        """What iteration yields as tensors on this rank: all on rank 0, nothing elsewhere."""
        return None if self.parallel.rank == 0 else set()
