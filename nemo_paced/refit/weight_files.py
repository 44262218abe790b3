"""``rollout.refit=file``, the trainer's part: all ranks gather, rank 0 writes safetensors files."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from nemo_paced.refit.file_transfer import VERSION_FILE
from nemo_paced.refit.weight_source import MegatronWeightSource

FILE_BYTES = 2**30  # a file ends once it holds so much: rank 0 keeps no more in memory


def write_weights(source: MegatronWeightSource, folder: Path | None, *, version: int) -> None:
    """Write the source's weights as safetensors files; collective.

    Args:
        folder: rank 0's, whose earlier content goes; ``None`` elsewhere.
        version: optimizer steps behind the weights.
    """
    if folder is None:
        for _ in source:  # take part in the gathers
            pass
    else:
        _write(source, folder, version)


def _write(source: MegatronWeightSource, folder: Path, version: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pending: dict[str, torch.Tensor] = {}
    size = count = 0

    def flush() -> None:
        nonlocal pending, size, count
        save_file(pending, folder / f"{count:05d}.safetensors")
        pending, size, count = {}, 0, count + 1

    for name, tensor in source:
        assert tensor is not None, "rank 0 gets every tensor"
        pending[name] = tensor.cpu().contiguous()
        size += tensor.numel() * tensor.element_size()
        if size >= FILE_BYTES:
            flush()
    if pending:
        flush()
    (folder / VERSION_FILE).write_text(str(version))
