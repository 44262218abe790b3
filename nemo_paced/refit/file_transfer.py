"""Safetensors files as a transport of weights: where they lie, and how servers load them.

This module imports no torch: programs that only serve send a finished model's files with it.
``file_sender.py`` writes the files of a model that is being trained.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nemo_paced.refit.weight_sync import WeightSync


def transfer_folder(model_bytes: int) -> tempfile.TemporaryDirectory[str]:
    """A new folder on this node: in memory where two copies of the model fit, else on its disk."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 2 * model_bytes
    return tempfile.TemporaryDirectory(
        prefix="nemo-paced-weights-", dir=memory if roomy else None, ignore_cleanup_errors=True
    )


def send_files(sync: WeightSync, files: Sequence[Path], version: str) -> None:
    """Pause the servers, make them load safetensors files with Hugging Face names, let them go on.

    Raises:
        RolloutError: a server refused or cannot be reached.
    """
    sync.version = version
    sync.pause()
    load_files(sync, files)
    sync.resume()


def load_files(sync: WeightSync, files: Sequence[Path]) -> None:
    """Make servers that are paused load safetensors files, as ``sync.version``.

    Raises:
        RolloutError: a server refused or cannot be reached.
    """
    sync.init_weight_transfer_engine({})
    sync.start_weight_update()
    for path in files:
        sync.update_weights({"path": str(path)})
    sync.finish_weight_update()
