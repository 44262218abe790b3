"""New weights into a running server, through vLLM's weight-transfer routes.

Every trainer rank iterates the ``WeightSource`` (a collective); rank 0 writes safetensors files to
node-local memory or disk and drives the server: pause, start, update with each file, finish,
resume. The files stay until the next refit, so that a restarted server can get them again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from nemo_paced.rollout.client import RolloutClient
from nemo_paced.rollout.weight_source import MegatronWeightSource

FILE_BYTES = 2**30
VERSION_FILE = "version"


def push_weights(
    client: RolloutClient | None,
    source: MegatronWeightSource,
    *,
    transfer_dir: Path | None,
    version: int,
) -> None:
    """Send the source's weights; collective. Only rank 0 has a client and a directory.

    Raises:
        RolloutError: the server refused or cannot be reached.
    """
    if client is None or transfer_dir is None:
        for _ in source:  # take part in the gathers
            pass
        return
    _write(source, transfer_dir, version)
    repeat_push(client, transfer_dir=transfer_dir)


def repeat_push(client: RolloutClient, *, transfer_dir: Path) -> None:
    """Send the files of the last :func:`push_weights` again; nothing where there was none."""
    if not (transfer_dir / VERSION_FILE).exists():
        return
    version = (transfer_dir / VERSION_FILE).read_text()
    send_files(client, sorted(transfer_dir.glob("*.safetensors")), version)


def send_files(client: RolloutClient, files: list[Path], version: str) -> None:
    """Make the servers load safetensors files with Hugging Face names, between requests."""
    client.call("POST", "/pause", params={"mode": "wait", "clear_cache": "true"})
    client.call("POST", "/init_weight_transfer_engine", json={"init_info": {}})
    client.call("POST", "/start_weight_update")
    for path in files:
        client.call("POST", "/update_weights", json={"update_info": {"path": str(path)}})
    client.call("POST", "/finish_weight_update", json={"weight_version": version})
    client.call("POST", "/reset_prefix_cache")  # cached keys and values are of the old weights
    client.call("POST", "/resume")


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
