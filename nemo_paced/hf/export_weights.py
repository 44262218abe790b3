"""Puts a sharded Megatron model back together as Hugging Face tensors, one parameter at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nemo_paced.errors import CheckpointError
from nemo_paced.hf.model import PacedGPTModel, load_hf_config, local_parameters
from nemo_paced.hf.shards import join
from nemo_paced.parallel import Parallel

SHARD_BYTES = 5 * 2**30
_WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".pt",
    ".pth",
)


def iter_hf_tensors(
    gpt: PacedGPTModel, parallel: Parallel
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """(Hugging Face name, whole tensor) of every parameter in the table's order.

    Collective over the first data-parallel replica: its tensor-parallel ranks gather, and the
    stage that holds a parameter sends it to the first stage. Rank 0 gets the tensors, the others
    ``None``; other replicas take no part.
    """
    held: dict[tuple[str, int | None], torch.Tensor] = {}
    if parallel.dp_rank == 0:
        for parameter, row, layer in local_parameters(gpt):
            held.setdefault((row.megatron, layer), parameter.detach())
    for row, layer in gpt.architecture.rows():
        names = [name.format(layer=layer) for name in row.hf]
        tensors: list[torch.Tensor | None] = [None] * len(names)
        if parallel.dp_rank == 0:
            owner = _owner(gpt, row.megatron, layer, parallel)
            shards = None
            if parallel.pp_rank == owner:
                shards = _gather(held[row.megatron, layer], parallel)
            if parallel.tp_rank == 0 and parallel.pp_rank in (0, owner):
                joined = join(row, shards, gpt.architecture) if shards else None
                shapes = gpt.architecture.hf_shapes(row)
                moved = [
                    _to_first_stage(joined[i] if joined else None, shape, gpt, owner, parallel)
                    for i, shape in enumerate(shapes)
                ]
                tensors = list(moved) if parallel.pp_rank == 0 else tensors
        yield from zip(names, tensors, strict=True)


def export_hf(
    gpt: PacedGPTModel,
    source_hf_dir: str | Path,
    out_dir: str | Path,
    parallel: Parallel,
) -> None:
    """Write a Hugging Face directory; collective. Rank 0 writes, under a temporary name first.

    Configuration, tokenizer, generation config and chat template are those of ``source_hf_dir``;
    padding rows of the vocabulary are not written.

    Raises:
        CheckpointError: ``out_dir`` exists and is not empty; on every rank.
    """
    source, final = Path(source_hf_dir), Path(out_dir).resolve()
    _check_empty(final, parallel)
    temporary = final.with_name(f".{final.name}.tmp")
    writer = _ShardWriter(temporary) if parallel.rank == 0 else None
    for name, tensor in iter_hf_tensors(gpt, parallel):
        if writer is not None:
            assert tensor is not None, "rank 0 gets every tensor"
            writer.add(name, tensor)
    if writer is not None:
        writer.close()
        copy_metadata(source, temporary)
        _set_dtype(temporary, next(gpt.parameters()).dtype)
        if final.exists():
            final.rmdir()
        temporary.rename(final)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _check_empty(folder: Path, parallel: Parallel) -> None:
    """Rank 0 looks for all: a rank that comes late would find what rank 0 has written by then."""
    taken = [False]
    if parallel.rank == 0:
        taken = [folder.exists() and (not folder.is_dir() or any(folder.iterdir()))]
    if parallel.world_size > 1:
        torch.distributed.broadcast_object_list(taken, src=0, device=parallel.device)
    if taken[0]:
        raise CheckpointError(f"{folder} exists and is not empty: choose a new directory")


def copy_metadata(source: Path, target: Path) -> None:
    """Everything of a Hugging Face directory but its weights."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        weights = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not weights:
            shutil.copy2(path, target / path.name)


class _ShardWriter:
    """Writes safetensors files of at most ``SHARD_BYTES``, and an index where there are several."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = 0
        self.parts: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > SHARD_BYTES:
            self._flush()
        self.pending[name] = tensor.cpu().contiguous()
        self.pending_bytes += size
        self.total_bytes += size

    def close(self) -> None:
        self._flush()
        count = len(self.parts)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.parts, 1):
            name = "model.safetensors"
            if count > 1:
                name = f"model-{number:05d}-of-{count:05d}.safetensors"
            (self.folder / f"part-{number}").rename(self.folder / name)
            weight_map |= dict.fromkeys(names, name)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))

    def _flush(self) -> None:
        self.parts.append(list(self.pending))
        path = self.folder / f"part-{len(self.parts)}"
        save_file(self.pending, path, metadata={"format": "pt"})
        self.pending, self.pending_bytes = {}, 0


def _set_dtype(folder: Path, dtype: torch.dtype) -> None:
    """``config.json`` names the dtype of the weights beside it."""
    config: dict[str, Any] = load_hf_config(folder)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _owner(gpt: PacedGPTModel, megatron: str, layer: int | None, parallel: Parallel) -> int:
    """The pipeline stage that holds a parameter (equal numbers of layers a stage)."""
    if layer is not None:
        return layer // len(gpt.decoder.layers)
    return 0 if megatron.startswith("embedding.") else parallel.pp_size - 1


def _gather(shard: torch.Tensor, parallel: Parallel) -> list[torch.Tensor]:
    if parallel.tp_size == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(parallel.tp_size)]
    torch.distributed.all_gather(shards, shard.contiguous(), group=parallel.tp_group)
    return shards


def _to_first_stage(
    tensor: torch.Tensor | None,
    shape: tuple[int, ...],
    gpt: PacedGPTModel,
    owner: int,
    parallel: Parallel,
) -> torch.Tensor | None:
    if owner == 0:
        return tensor
    if parallel.pp_rank == owner:
        assert tensor is not None, "the owner has gathered it"
        torch.distributed.send(tensor.contiguous(), group=parallel.pp_group, group_dst=0)
        return None
    received = torch.empty(shape, dtype=next(gpt.parameters()).dtype, device=parallel.device)
    torch.distributed.recv(received, group=parallel.pp_group, group_src=owner)
    return received
