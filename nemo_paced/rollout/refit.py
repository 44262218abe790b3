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

from nemo_paced.errors import ConfigError, RolloutError
from nemo_paced.rollout.client import RolloutClient
from nemo_paced.rollout.weight_source import MegatronWeightSource

FILE_BYTES = 2**30
ROUTE_TIMEOUT_S = 30.0
VERSION_FILE = "version"


def write_weights(source: MegatronWeightSource, folder: Path | None, *, version: int) -> None:
    """Write the source's weights as safetensors; collective. Only rank 0 has a folder."""
    if folder is None:
        for _ in source:  # take part in the gathers
            pass
    else:
        _write(source, folder, version)


def send_weights(client: RolloutClient, folder: Path) -> None:
    """Make the servers load what :func:`write_weights` last wrote; nothing where it never did.

    Raises:
        RolloutError: a server refused or cannot be reached.
    """
    version = written_version(folder)
    if version is None:
        return
    send_files(client, sorted(folder.glob("*.safetensors")), version)


def written_version(folder: Path) -> str | None:
    """The version that :func:`write_weights` last wrote; ``None`` before the first."""
    path = folder / VERSION_FILE
    return path.read_text() if path.exists() else None


def served_version(client: RolloutClient) -> str | None:
    """The version that a server was last sent; ``None`` for the weights it started with.

    Raises:
        RolloutError: it cannot be reached, or has no weight routes.
    """
    return client.call("GET", "/weight_info")[0].get("weight_version")  # type: ignore[no-any-return]


def check_weight_routes(client: RolloutClient) -> None:
    """Whether every server takes new weights as we send them.

    Raises:
        ConfigError: names a server that does not.
    """
    for endpoint in client.endpoints:
        one = client.only(endpoint, timeout_s=ROUTE_TIMEOUT_S)
        try:
            one.call("GET", "/weight_info")
            one.call("POST", "/init_weight_transfer_engine", json={"init_info": {}})
        except RolloutError as error:
            raise ConfigError(
                f"rollout.endpoints: {endpoint} does not take new weights, which this run has to "
                f"send ({error}): start it with `nemo-paced rollout-server`, or keep to stages "
                "with responses=references, without new pass rates and validation"
            ) from error


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
