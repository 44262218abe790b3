"""A teacher's top-k signal of stored responses on disk: computed once, used in every epoch.

Content-addressed: an entry's name is a hash of the teacher, of what was cut from it (k,
temperature, vocabulary) and of the token ids it saw. A changed teacher, prompt or tokenizer finds
no entry and is computed anew; nothing stale is ever read, and runs may share a folder. An entry is
written under another name and renamed, so that a killed run leaves none half-written; one that is
damaged all the same is named, and computed again.

Not covered: hidden states (16 times larger at h = 4,096 and k = 64), eviction.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from nemo_paced.data.packing import TrainItem
from nemo_paced.losses.topk import TopKTeacher

logger = logging.getLogger(__name__)

_FIELDS = ("log_probs", "ids", "tail_log_prob")


def model_identity(hf_dir: Path) -> str:
    """Which weights a Hugging Face directory holds: configuration, and each weight file's name,
    size and time of change (hashing 140 GB at each start would take minutes; a copy with other
    times is computed anew, which is safe)."""
    digest = hashlib.sha256((hf_dir / "config.json").read_bytes())
    for path in sorted(hf_dir.glob("*.safetensors")):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class TopKCache:
    """Entries of one teacher and one way to cut its signal.

    Attributes:
        identity: all that decides a signal but the token ids, as JSON values.
    """

    folder: Path
    identity: dict[str, Any]

    def get(self, item: TrainItem, device: torch.device) -> TopKTeacher | None:
        """The entry of the item's response, on the device; ``None`` without a whole one."""
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
            return TopKTeacher(*(tensors[name].to(device) for name in _FIELDS))
        except (SafetensorError, KeyError) as error:
            logger.warning("teacher cache: %s is damaged (%s): computed again", path, error)
            return None

    def put(self, item: TrainItem, signal: TopKTeacher) -> None:
        """Keep a signal; one of the ranks that hold it calls this. A full disk costs the entry."""
        tensors = {name: getattr(signal, name).cpu().contiguous() for name in _FIELDS}
        content = safetensors.torch.save(tensors)
        path = self._path(item)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(hashlib.sha256(content).digest() + content)
            os.replace(temporary, path)
        except OSError as error:
            logger.warning("teacher cache: %s was not written: %s", path, error)
            temporary.unlink(missing_ok=True)

    def _path(self, item: TrainItem) -> Path:
        key = json.dumps(
            [self.identity, item.teacher_prompt_ids, item.response_ids], sort_keys=True
        )
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.topk"
