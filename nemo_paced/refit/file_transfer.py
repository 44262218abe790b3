"""``rollout.refit=file``, the servers' part: they load new weights from safetensors files.

Every trainer rank iterates the ``WeightSource`` (a collective) and rank 0 writes files to memory or
disk of its node (``weight_files.py``); this module drives the servers: pause, start, update with
each file, finish, resume. The files stay until the next refit, so that a restarted server can get
them again.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from nemo_paced.config import RefitBackend
from nemo_paced.errors import ConfigError, RolloutError
from nemo_paced.refit.weight_sync import WeightSync
from nemo_paced.serving.client import RolloutClient

ROUTE_TIMEOUT_S = 30.0  # of each call that checks a server
VERSION_FILE = "version"


def transfer_folder(model_bytes: int) -> tempfile.TemporaryDirectory[str]:
    """A new folder on this node: in memory where two copies of the model fit, else on its disk."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2 * model_bytes
    return tempfile.TemporaryDirectory(
        prefix="nemo-paced-weights-", dir=memory if roomy else None, ignore_cleanup_errors=True
    )


def written_version(folder: Path) -> str | None:
    """The version that :func:`weight_files.write_weights` last wrote; ``None`` before the first."""
    path = folder / VERSION_FILE
    return path.read_text() if path.exists() else None


def check_weight_routes(client: RolloutClient, backend: RefitBackend) -> None:
    """Check that every server takes new weights over ``backend``.

    Raises:
        ConfigError: names a server that does not.
    """
    for endpoint in client.endpoints:
        control = client.only(endpoint, timeout_s=ROUTE_TIMEOUT_S).control
        try:
            control.weight_versions()
            if backend is RefitBackend.file:
                control.join_group({})
        except RolloutError as error:
            raise ConfigError(
                f"rollout.endpoints: {endpoint} does not take new weights, which this run has to "
                f"send ({error}): start it with `nemo-paced rollout-server "
                f"rollout.refit={backend.value}`, or keep to stages "
                "with responses=references, without new pass rates and validation"
            ) from error


def send_files(sync: WeightSync, files: list[Path], version: str) -> None:
    """Make the servers load safetensors files with Hugging Face names.

    Raises:
        RolloutError: a server refused or cannot be reached.
    """
    sync.version = version
    sync.pause()
    sync.init_weight_transfer_engine({})
    sync.start_weight_update()
    for path in files:
        sync.update_weights({"path": str(path)})
    sync.finish_weight_update()
    sync.resume()
