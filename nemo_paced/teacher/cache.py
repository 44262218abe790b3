"""A teacher's signal of stored responses on disk: computed once, used in every epoch.

It is content-addressed: an entry's name is a hash of the teacher (weights, precision and FP8), of
what was taken from it (hidden states, or a top-k with k, temperature and vocabulary) and of the
token ids it saw. A changed teacher, prompt or tokenizer
finds no entry, and the signal is computed anew; nothing stale is ever read, and runs may share a
folder. An entry is written under another name and renamed, so that a killed run leaves none
half-written; one that is damaged all the same is named in a warning and computed again.

Entries are never evicted.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from nemo_paced.data.packing import TrainItem
from nemo_paced.files import write_whole
from nemo_paced.losses.topk import TopKTeacher
from nemo_paced.teacher.signal import ResponseSignal

logger = logging.getLogger(__name__)

_TOP_K = ("log_probs", "ids", "tail_log_prob")
_HIDDEN = "hidden"


def model_identity(hf_dir: Path) -> str:
    """SHA-256 in hex of a model's configuration and its weight files' names, sizes and times.

    The files' contents are not read: hashing 140 GB at each start would take minutes. A copy with
    other times of change counts as another model, which is safe: its signals are computed anew.
    """
    digest = hashlib.sha256((hf_dir / "config.json").read_bytes())
    for path in sorted(hf_dir.glob("*.safetensors")):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class SignalCache:
    """Signals of one kind of one teacher, each of a response, as files of a folder.

    Attributes:
        identity: all that decides a signal but the token ids, as JSON values.
    """

    folder: Path
    identity: dict[str, Any]

    def get(self, item: TrainItem, device: torch.device) -> ResponseSignal | None:
        """The signal of the item's response, on the device; ``None`` without an undamaged entry."""
        path = self._path(item)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            checksum, content = content[:32], content[32:]
            if hashlib.sha256(content).digest() != checksum:
                raise SafetensorError("checksum differs")
            tensors = safetensors.torch.load(content)
            if _HIDDEN in tensors:
                return tensors[_HIDDEN].to(device)
            return TopKTeacher(*(tensors[name].to(device) for name in _TOP_K))
        except (SafetensorError, KeyError) as error:
            logger.warning("teacher cache: %s is damaged (%s): computed again", path, error)
            return None

    def has(self, item: TrainItem) -> bool:
        """Whether there is an entry for the item's response, without reading it."""
        return self._path(item).exists()

    def put(self, item: TrainItem, signal: ResponseSignal) -> None:
        """Write a signal; called by one of the ranks that hold it.

        What cannot be written (the disk is full, say) is left out with a warning.
        """
        if isinstance(signal, TopKTeacher):
            parts = {name: getattr(signal, name) for name in _TOP_K}
        else:
            parts = {_HIDDEN: signal}
        # a view of a batch's tensor would be written with all of its storage
        tensors = {
            name: part.cpu().clone(memory_format=torch.contiguous_format)
            for name, part in parts.items()
        }
        content = safetensors.torch.save(tensors)
        path = self._path(item)
        try:
            write_whole(path, hashlib.sha256(content).digest() + content)
        except OSError as error:
            logger.warning("teacher cache: %s was not written: %s", path, error)

    def _path(self, item: TrainItem) -> Path:
        key = json.dumps(
            [self.identity, item.teacher_prompt_ids, item.response_ids], sort_keys=True
        )
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.signal"
