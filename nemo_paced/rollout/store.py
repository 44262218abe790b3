"""Finished rollouts on disk: an append-only log that loses at most what was in flight.

Each line is ``crc32 json``; lines are written as soon as a request is finished and synced to disk.
A last line cut by a crash is dropped (its rollout is asked for again); a damaged line before it
means that the file was changed by something else, and is refused.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_paced.errors import RolloutError
from nemo_paced.records import Rollout

logger = logging.getLogger(__name__)

Key = tuple[str, int, str, int]  # purpose, step, problem id, sample


class RolloutStore:
    """Rollouts by (purpose, step, problem, sample); one writer.

    Raises:
        RolloutError: a damaged file, or no room to write.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "rollouts.log"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._rollouts: dict[Key, Rollout] = {}
        whole = self._read()
        self._file = self.path.open("r+b" if self.path.exists() else "w+b")
        self._file.truncate(whole)
        self._file.seek(whole)

    def __enter__(self) -> RolloutStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._rollouts)

    def get(self, purpose: str, step: int, problem_id: str, sample: int) -> Rollout | None:
        return self._rollouts.get((purpose, step, problem_id, sample))

    def append(self, purpose: str, rollouts: Iterable[Rollout]) -> None:
        """Write rollouts and sync; one that is stored already is left as it is."""
        new = [
            r for r in rollouts if (purpose, r.step, r.problem_id, r.sample) not in self._rollouts
        ]
        begin = self._file.tell()
        try:
            self._file.write(b"".join(_line(purpose, rollout) for rollout in new))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._drop_after(begin)
            raise RolloutError(
                f"{self.path} cannot be written: {error}. The {len(self)} rollouts before are "
                "safe; free space and start the same command again"
            ) from error
        for rollout in new:
            self._rollouts[purpose, rollout.step, rollout.problem_id, rollout.sample] = rollout

    def _drop_after(self, offset: int) -> None:
        """Back to whole lines; on a full disk even that may fail, then reading drops the rest."""
        try:
            self._file.seek(offset)
            self._file.truncate(offset)
        except OSError:
            logger.warning("%s ends in a cut line", self.path)

    def _read(self) -> int:
        """Load all whole lines; returns the offset behind the last of them."""
        if not self.path.exists():
            return 0
        data = self.path.read_bytes()
        offset = 0
        while offset < len(data):
            end = data.find(b"\n", offset)
            if end < 0:
                logger.warning("%s: the last line was cut at byte %d: dropped", self.path, offset)
                break
            self._load(data[offset:end], offset)
            offset = end + 1
        return offset

    def _load(self, line: bytes, offset: int) -> None:
        checksum, _, body = line.partition(b" ")
        if checksum != _checksum(body):
            raise RolloutError(
                f"{self.path} is damaged at byte {offset}: the checksum does not fit. Restore the "
                "file, or remove it to sample again"
            )
        fields = json.loads(body)
        purpose = fields.pop("purpose")
        rollout = _rollout(fields)
        self._rollouts[purpose, rollout.step, rollout.problem_id, rollout.sample] = rollout


def _line(purpose: str, rollout: Rollout) -> bytes:
    body = json.dumps({"purpose": purpose, **asdict(rollout)}).encode()
    return _checksum(body) + b" " + body + b"\n"


def _checksum(body: bytes) -> bytes:
    return b"%08x" % zlib.crc32(body)


def _rollout(fields: dict[str, Any]) -> Rollout:
    fields["response_ids"] = tuple(fields["response_ids"])
    fields["logprobs"] = tuple(fields["logprobs"])
    return Rollout(**fields)
