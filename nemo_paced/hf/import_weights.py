"""Import of a Hugging Face checkpoint (safetensors) into one rank's part of a Megatron model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nemo_paced.errors import CheckpointError
from nemo_paced.hf.architectures import Architecture
from nemo_paced.hf.model import PacedGPTModel, local_parameters
from nemo_paced.hf.rows import ParameterRow
from nemo_paced.hf.shards import cut
from nemo_paced.parallel.groups import Parallel


def load_hf_weights(
    chunks: Sequence[PacedGPTModel],
    hf_dir: str | Path,
    parallel: Parallel,
    *,
    progress: Callable[[int, int], None] | None = None,
    on_loaded: Callable[[torch.nn.Parameter], None] | None = None,
) -> None:
    """Fill a model from safetensors files, reading only the slices that this rank keeps.

    Args:
        chunks: as ``build_chunks`` made them.
        progress: called after each parameter with (parameters read, parameters of this rank).
        on_loaded: called with each parameter when it is filled; may replace the parameter's module.

    Raises:
        CheckpointError: files or tensors missing, unexpected, or of another shape, all named.
    """
    architecture = chunks[0].architecture
    with ExitStack() as stack:
        files = _open(Path(hf_dir), stack)
        _check_names(files, architecture, Path(hf_dir))
        held = list(local_parameters(chunks))
        for done, (parameter, row, layer) in enumerate(held, 1):
            names = [name.format(layer=layer) for name in row.hf]
            slices = [_slice(files, name, architecture, row, i) for i, name in enumerate(names)]
            value = cut(
                row,
                slices,
                architecture,
                rank=parallel.tp_rank if row.expert is None else 0,
                size=parallel.tp_size if row.expert is None else 1,
                padded_vocab=chunks[0].vocab_size,
            )
            with torch.no_grad():
                parameter.copy_(value)
            if on_loaded is not None:
                on_loaded(parameter)
            if progress is not None:
                progress(done, len(held))


def load_hf_head(
    architecture: Architecture,
    hf_dir: str | Path,
    parallel: Parallel,
    *,
    padded_vocab: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The LM head (the embedding where they are tied) alone, cut in the layout of ``parallel``.

    Args:
        padded_vocab: rows over all tensor-parallel ranks; rows beyond the model's are 0.

    Returns:
        [padded_vocab/tp, h] in ``dtype``, on the rank's device.

    Raises:
        CheckpointError: as :func:`load_hf_weights`.
    """
    row, _ = list(architecture.rows())[0 if architecture.tied else -1]
    with ExitStack() as stack:
        files = _open(Path(hf_dir), stack)
        _check_names(files, architecture, Path(hf_dir))
        value = cut(
            row,
            [_slice(files, row.hf[0], architecture, row, 0)],
            architecture,
            rank=parallel.tp_rank,
            size=parallel.tp_size,
            padded_vocab=padded_vocab,
        )
        return value.to(device=parallel.device, dtype=dtype, copy=True)


def _open(hf_dir: Path, stack: ExitStack) -> dict[str, Any]:
    """The open safetensors file of each tensor, by the tensor's name; ``stack`` closes them."""
    index = hf_dir / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{index} is damaged: {error}") from error
    files: dict[str, Any] = {}
    for name in names:
        path = hf_dir / name
        if not path.exists():
            raise CheckpointError(
                f"{path} does not exist: {hf_dir} must hold its weights as safetensors"
            )
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        files |= dict.fromkeys(file.keys(), file)
    return files


def _check_names(files: dict[str, Any], architecture: Architecture, hf_dir: Path) -> None:
    expected = {name.format(layer=layer) for row, layer in architecture.rows() for name in row.hf}
    ignored = {"lm_head.weight"} if architecture.tied else set()
    # tables that old releases of transformers wrote and all releases compute
    ignored |= {name for name in files if name.endswith(".rotary_emb.inv_freq")}
    missing, extra = expected - files.keys(), files.keys() - expected - ignored
    if missing or extra:
        misfits = [
            f"{len(names)} {kind} ({', '.join(sorted(names)[:3])})"
            for kind, names in (("missing", missing), ("unexpected", extra))
            if names
        ]
        raise CheckpointError(
            f"tensors of {hf_dir} do not fit its {architecture.name}: {'; '.join(misfits)}"
        )


def _slice(
    files: dict[str, Any], name: str, architecture: Architecture, row: ParameterRow, index: int
) -> Any:
    found = files[name].get_slice(name)
    shape, expected = tuple(found.get_shape()), architecture.hf_shapes(row)[index]
    if shape != expected:
        raise CheckpointError(f"tensor {name} has shape {shape}, its config.json says {expected}")
    return found
