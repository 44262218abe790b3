"""Export of a sharded Megatron model as Hugging Face tensors, one whole parameter at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nemo_paced.errors import CheckpointError
from nemo_paced.hf.directory import load_hf_config
from nemo_paced.hf.model import PacedGPTModel, local_parameters
from nemo_paced.hf.rows import EMBEDDING, ParameterRow
from nemo_paced.hf.shards import join
from nemo_paced.parallel.groups import Parallel

SHARD_BYTES = 5 * 2**30  # of a safetensors file; a larger tensor gets a file of its own
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
    chunks: Sequence[PacedGPTModel], parallel: Parallel
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield (Hugging Face name, whole tensor) of every parameter, in ``Architecture.rows`` order.

    Collective over one copy of the model: its tensor-parallel ranks gather, and the rank that then
    has a parameter whole (an expert's is whole where it lies) sends it to rank 0. Rank 0 gets the
    tensors, the others ``None``; other replicas take no part. No rank holds more than one parameter
    beside its own shards.
    """
    held = {(row, layer): p.detach() for p, row, layer in local_parameters(chunks)}
    for row, layer in chunks[0].architecture.rows():
        names = [name.format(layer=layer) for name in row.hf]
        yield from zip(names, _collect(chunks, row, layer, held, parallel), strict=True)


def _collect(
    chunks: Sequence[PacedGPTModel],
    row: ParameterRow,
    layer: int | None,
    held: dict[tuple[ParameterRow, int | None], torch.Tensor],
    parallel: Parallel,
) -> Sequence[torch.Tensor | None]:
    """The Hugging Face tensors of one parameter on rank 0, ``None`` each elsewhere."""
    nothing, gpt = [None] * len(row.hf), chunks[0]
    stage = stage_of(chunks, row, layer, parallel)
    joined = None
    if parallel.pp_rank == stage and _has_part(gpt, row, parallel):
        joined = join(row, gather_shards(row, held[row, layer], parallel), gpt.architecture)
    source = _source(gpt, row, stage, parallel)
    if parallel.rank == 0:
        if source == 0:
            assert joined is not None, "rank 0 has it whole"
            return joined
        return [_receive(shape, source, gpt, parallel) for shape in gpt.architecture.hf_shapes(row)]
    if parallel.rank == source:
        assert joined is not None, "the source has it whole"
        for tensor in joined:
            torch.distributed.send(tensor.contiguous(), dst=0)
    return nothing


def export_hf(
    chunks: Sequence[PacedGPTModel],
    source_hf_dir: str | Path,
    out_dir: str | Path,
    parallel: Parallel,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a model as a Hugging Face directory; collective over all ranks.

    Rank 0 writes, under a temporary name until all is there.

    Configuration, tokenizer, generation config and chat template are those of ``source_hf_dir``;
    padding rows of the vocabulary are not written. What an interrupted export leaves under the
    temporary name, the next one replaces.

    Args:
        progress: called as each tensor arrives, before it is written, with (number of this one
            from 1, tensors in all); on every rank.

    Raises:
        CheckpointError: ``out_dir`` exists and is not empty; on every rank.
    """
    source, final = Path(source_hf_dir), Path(out_dir).resolve()
    check_new_directory(final, parallel)
    temporary = final.with_name(f".{final.name}.tmp")
    writer = _ShardWriter(temporary) if parallel.rank == 0 else None
    total = sum(len(row.hf) for row, _ in chunks[0].architecture.rows())
    for done, (name, tensor) in enumerate(iter_hf_tensors(chunks, parallel), 1):
        if progress is not None:
            progress(done, total)
        if writer is not None:
            assert tensor is not None, "rank 0 gets every tensor"
            writer.add(name, tensor)
    if writer is not None:
        writer.close()
        copy_metadata(source, temporary)
        _set_dtype(temporary, next(chunks[0].parameters()).dtype)
        if final.exists():
            final.rmdir()
        temporary.rename(final)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def check_new_directory(folder: Path, parallel: Parallel) -> None:
    """Refuse a target directory that exists and is not empty; collective over all ranks.

    Rank 0 looks for all: a rank that comes late would find what rank 0 has written by then.

    Raises:
        CheckpointError: on every rank.
    """
    taken = [False]
    if parallel.rank == 0:
        taken = [folder.exists() and (not folder.is_dir() or any(folder.iterdir()))]
    if parallel.world_size > 1:
        torch.distributed.broadcast_object_list(taken, src=0, device=parallel.device)
    if taken[0]:
        raise CheckpointError(f"{folder} exists and is not empty: choose a new directory")


def copy_metadata(source: Path, target: Path) -> None:
    """Copy the files of a Hugging Face directory but its weights and their index."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        weights = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not weights:
            shutil.copy2(path, target / path.name)


class _ShardWriter:
    """Writer of safetensors files up to ``SHARD_BYTES``, with an index where there are several."""

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
    """Make ``config.json`` name the dtype of the weights beside it."""
    config: dict[str, Any] = load_hf_config(folder)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def stage_of(
    chunks: Sequence[PacedGPTModel], row: ParameterRow, layer: int | None, parallel: Parallel
) -> int:
    """The pipeline stage that holds a parameter; chunks of equal size are dealt out in turn."""
    if layer is not None:
        return layer // len(chunks[0].decoder.layers) % parallel.pp_size
    return 0 if row is EMBEDDING else parallel.pp_size - 1


def _has_part(gpt: PacedGPTModel, row: ParameterRow, parallel: Parallel) -> bool:
    """Whether this rank of the stage helps to put the parameter together."""
    if row.expert is None:
        return parallel.groups.dp_cp.rank() == 0
    return parallel.groups.expt_dp.rank() == 0 and gpt.expert_owner(row.expert) == parallel.ep_rank


def _source(gpt: PacedGPTModel, row: ParameterRow, stage: int, parallel: Parallel) -> int:
    """The rank, in the job's numbers, that has the parameter whole once parts are joined.

    Ranks of a stage are neighbours, and the first ones are its first expert-parallel group; the
    first of all is the first tensor-parallel rank of the first replica.
    """
    ranks_of_stage = parallel.world_size // parallel.pp_size
    first = stage * ranks_of_stage
    return first if row.expert is None else first + gpt.expert_owner(row.expert)


def gather_shards(row: ParameterRow, shard: torch.Tensor, parallel: Parallel) -> list[torch.Tensor]:
    """All tensor-parallel ranks' parts of a parameter in rank order; collective over the group.

    An expert's parameter is whole on its rank: its one part is ``shard``, and nothing is sent.
    """
    if parallel.tp_size == 1 or row.expert is not None:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(parallel.tp_size)]
    torch.distributed.all_gather(shards, shard.contiguous(), group=parallel.tp_group)
    return shards


def _receive(
    shape: tuple[int, ...], source: int, gpt: PacedGPTModel, parallel: Parallel
) -> torch.Tensor:
    received = torch.empty(shape, dtype=next(gpt.parameters()).dtype, device=parallel.device)
    torch.distributed.recv(received, src=source)
    return received
