"""The trainer's end of ``rollout.refit=file``: all ranks gather, rank 0 writes safetensors files.

The files lie in memory or on a disk that servers read too. They stay until the next update, so that
rank 0 alone can bring a server that was started again to the weights of the others.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from nemo_paced.refit.file_transfer import load_files
from nemo_paced.refit.weight_sync import WeightSync

FILE_BYTES = 2**30  # a file ends once it holds so much: rank 0 keeps no more in memory


class FileSender:
    """Sender of ``rollout.refit=file``; every trainer rank makes one and calls it at the same time.

    Args:
        sync: rank 0's; ``None`` on the others, which only take part in gathering the weights.
        source: Hugging Face names and whole tensors, anew in every iteration, which is collective;
            on the other ranks the tensors are ``None``.
        folder: rank 0's, for the files of up to two versions.
    """

    def __init__(
        self,
        sync: WeightSync | None,
        source: Iterable[tuple[str, torch.Tensor | None]],
        folder: Path | None,
    ) -> None:
        self.sync = sync
        self.source = source
        self.folder = folder
        self._prepared: Path | None = None
        self._current: Path | None = None

    def prepare(self) -> None:
        """Write the weights beside those that servers may still ask for; collective."""
        if self.sync is None:
            for _ in self.source:  # take part in the gathers
                pass
            return
        self._remove(self._prepared)  # of an update that never came
        self._prepared = Path(tempfile.mkdtemp(dir=self.folder))
        write_files(self.source, self._prepared)

    def send_weights(self) -> None:
        """Make all servers, paused, load the files; see :class:`~.meeting.Sender`."""
        if self.sync is None:
            return
        if self._prepared is not None:
            self._remove(self._current)
            self._current, self._prepared = self._prepared, None
        self.again(self.sync)

    def again(self, sync: WeightSync) -> None:
        """Make servers, paused, load the files of the last update, as ``sync.version``.

        Raises:
            RolloutError: a server refused or cannot be reached.
        """
        assert self._current is not None, "weights have been sent"
        load_files(sync, sorted(self._current.iterdir()))

    def abandon(self) -> bool:
        """Nothing is left to end: rank 0 sends alone."""
        return True

    def shutdown(self) -> None:
        """Remove the files."""
        self._remove(self._prepared)
        self._remove(self._current)

    @staticmethod
    def _remove(folder: Path | None) -> None:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def write_files(source: Iterable[tuple[str, torch.Tensor | None]], folder: Path) -> None:
    """Write named tensors as safetensors files of about ``FILE_BYTES``, in the source's order."""
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
