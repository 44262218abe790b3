"""The sharded student as a ``WeightSource`` of vLLM's weight-transfer interface.

It has the methods of vLLM's class without importing vLLM: trainer and server may live in different
environments. A test holds it to the real one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from nemo_paced.hf.export_weights import iter_hf_tensors
from nemo_paced.hf.model import PacedGPTModel
from nemo_paced.parallel.groups import Parallel

_LAYER = re.compile(r"model\.layers\.\d+\.")


@dataclass(frozen=True, slots=True)
class ParamMeta:
    """Name, dtype on the wire, and whole shape of one Hugging Face parameter."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class MegatronWeightSource:
    """Hugging Face names and whole tensors of a Megatron model, in the architecture table's order.

    Iterating is collective over the ranks that hold a part, in lockstep; rank 0 alone receives the
    tensors, the others ``None``. Every pass is fresh: it reads the weights as they are.
    """

    def __init__(self, chunks: Sequence[PacedGPTModel], parallel: Parallel) -> None:
        self.chunks = chunks
        self.parallel = parallel
        self.dtype = next(chunks[0].parameters()).dtype

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and whole shape of every parameter, on every rank; nothing is moved."""
        architecture = self.chunks[0].architecture
        return [
            ParamMeta(name.format(layer=layer), self.dtype, shape)
            for row, layer in architecture.rows()
            for name, shape in zip(row.hf, architecture.hf_shapes(row), strict=True)
        ]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        return iter_hf_tensors(self.chunks, self.parallel)

    def groups(self) -> list[list[str]]:
        """Parameter names in batches of a layer, as this rank's :meth:`iter_groups` yields them."""
        if self.held_names() is not None:
            return []
        groups: dict[str, list[str]] = {}
        for meta in self.metadata():
            layer = _LAYER.match(meta.name)
            # what stands before the layers and what stands behind them are groups too
            key = layer.group() if layer else ("behind" if len(groups) > 1 else "before")
            groups.setdefault(key, []).append(meta.name)
        return list(groups.values())

    def iter_groups(self) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        """Iterate in batches of a layer, as (names, tensors).

        A rank that receives nothing takes part and yields none. It is collective like iteration:
        run it to its end on every rank.
        """
        walk = iter(self)
        for names in self.groups():
            tensors = [tensor for _, tensor in islice(walk, len(names)) if tensor is not None]
            assert len(tensors) == len(names), "the rank that holds all of them got fewer"
            yield names, tensors
        for _ in walk:
            pass

    def held_names(self) -> set[str] | None:
        """Names of the parameters whose tensors this rank gets from an iteration.

        ``None`` says all, on rank 0; the others get none.
        """
        return None if self.parallel.rank == 0 else set()
