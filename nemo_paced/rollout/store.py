"""Finished rollouts on disk: an append-only log that loses at most what was in flight.

Each line is ``crc32 json``; the lines of a request are written as soon as it is finished and synced
to disk. A last line cut by a crash is dropped (its rollout is asked for again); a damaged line
before it means that the file was changed by something else, and is refused. Memory holds where
each rollout lies, not the rollout: a run keeps millions of tokens.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import sys
import threading
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, overload

from nemo_paced.errors import RolloutError
from nemo_paced.records import Outcome, Rollout

logger = logging.getLogger(__name__)

HOLD_S = 10.0  # wait for the last process of a killed run to be gone

Key = tuple[str, int, str, int]  # purpose, step, problem id, sample


class _Place(NamedTuple):
    """Where the line of a rollout is, and the digests that say what it is good for."""

    offset: int
    length: int
    asked: str
    graded: str


class RolloutStore:
    """Rollouts by (purpose, step, problem, sample); one process writes, from any of its threads.

    Raises:
        RolloutError: a damaged file, one that another process holds, or no room to write.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "rollouts.log"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._places: dict[Key, _Place] = {}
        self._lengths: dict[str, int] = {}  # tokens of a problem's latest rollout
        self._waiting: dict[Key, tuple[Rollout, bytes]] = {}  # with their lines, not written yet
        self._writing = threading.Lock()
        self._file = self.path.open("ab+", buffering=0)
        try:
            _hold(self._file.fileno(), self.path)
            self._end = self._read()
            self._file.truncate(self._end)
        except BaseException:
            self._file.close()
            raise
        _sync_folder(self.path.parent)  # the file's name must survive a crash too

    def __enter__(self) -> RolloutStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def holds(self, key: Key, asked: str) -> bool:
        """Whether a rollout is stored that was asked for so; one that does not say counts."""
        place = self._places.get(key)
        return place is not None and place.asked in (asked, "")

    def graded(self, key: Key) -> str:
        """What the verdict of a stored rollout depended on, as a digest; empty: it does not say."""
        return self._places[key].graded

    def get(self, purpose: str, step: int, problem_id: str, sample: int) -> Rollout | None:
        """Read a rollout back from disk.

        Raises:
            RolloutError: the file was changed since it was opened.
        """
        place = self._places.get((purpose, step, problem_id, sample))
        if place is None:
            return None
        line = os.pread(self._file.fileno(), place.length, place.offset)
        return self._parse(line.removesuffix(b"\n"), place.offset)[1]

    def known_length(self, problem_id: str) -> int | None:
        """Tokens of a problem's latest rollout, whatever its purpose: a guess of the next one's."""
        return self._lengths.get(problem_id)

    def append(self, purpose: str, rollouts: Iterable[Rollout]) -> None:
        """Write rollouts and sync; one that is stored already is left as it is.

        One that was asked for or graded otherwise is replaced: the file keeps both, and the later
        one counts.

        A sync takes milliseconds, tens of them on a network file system, so the thread whose turn
        it is writes what all of them bring, with one sync.
        """
        self._waiting |= {_key(purpose, r): (r, _line(purpose, r)) for r in rollouts}
        with self._writing:
            found = self._waiting.copy()
            new = {k: entry for k, entry in found.items() if not self._is_stored(k, entry[0])}
            if new:  # else another thread has written all of them with its own
                self._write(new)
            for key in found:
                del self._waiting[key]

    def _write(self, new: dict[Key, tuple[Rollout, bytes]]) -> None:
        try:
            _write_all(self._file.fileno(), b"".join(line for _, line in new.values()))
            os.fsync(self._file.fileno())
        except OSError as error:
            self._drop_cut_line()
            raise RolloutError(
                f"{self.path} cannot be written: {error}. The {len(self)} rollouts before are "
                "safe; free space and start the same command again"
            ) from error
        for key, (rollout, line) in new.items():
            self._enter(key, rollout, self._end, len(line))
            self._end += len(line)

    def _is_stored(self, key: Key, rollout: Rollout) -> bool:
        return self.holds(key, rollout.asked) and self.graded(key) == rollout.graded

    def _enter(self, key: Key, rollout: Rollout, offset: int, length: int) -> None:
        # many rollouts share a digest: it is kept once
        asked, graded = sys.intern(rollout.asked), sys.intern(rollout.graded)
        self._places[key] = _Place(offset, length, asked, graded)
        self._lengths[rollout.problem_id] = len(rollout.response_ids)

    def _drop_cut_line(self) -> None:
        """Cut the file back to whole lines; where even that fails, reading drops the rest."""
        try:
            self._file.truncate(self._end)
        except OSError:
            logger.warning("%s ends in a cut line", self.path)

    def _read(self) -> int:
        """Find all whole lines; returns the offset behind the last of them."""
        offset = 0
        with self.path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    logger.warning("%s: a last line cut at byte %d: dropped", self.path, offset)
                    break
                purpose, rollout = self._parse(line[:-1], offset)
                self._enter(_key(purpose, rollout), rollout, offset, len(line))
                offset += len(line)
        return offset

    def _parse(self, line: bytes, offset: int) -> tuple[str, Rollout]:
        checksum, _, body = line.partition(b" ")
        if checksum != _checksum(body):
            raise RolloutError(
                f"{self.path} is damaged at byte {offset}: the checksum does not fit. Restore the "
                "file, or remove it to sample again"
            )
        fields = json.loads(body)
        return fields.pop("purpose"), _rollout(fields)


class StoredRollouts(Sequence[Rollout]):
    """Rollouts of a store, read from disk when they are looked at; the store has to be open.

    Raises:
        RolloutError: one of them is not stored.
    """

    def __init__(self, store: RolloutStore, keys: Sequence[Key]) -> None:
        if lacking := [key for key in keys if key not in store]:
            raise RolloutError(f"{store.path} lacks {len(lacking)} rollouts, first {lacking[0]}")
        self._store, self._keys = store, keys

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, index: int) -> Rollout: ...

    @overload
    def __getitem__(self, index: slice) -> list[Rollout]: ...

    def __getitem__(self, index: int | slice) -> Rollout | list[Rollout]:
        if isinstance(index, slice):
            return [self._read(key) for key in self._keys[index]]
        return self._read(self._keys[index])

    def _read(self, key: Key) -> Rollout:
        rollout = self._store.get(*key)
        assert rollout is not None, "it was there when this was made, and nothing removes one"
        return rollout


def _key(purpose: str, rollout: Rollout) -> Key:
    return purpose, rollout.step, rollout.problem_id, rollout.sample


def _line(purpose: str, rollout: Rollout) -> bytes:
    body = json.dumps({"purpose": purpose, **asdict(rollout)}).encode()
    return _checksum(body) + b" " + body + b"\n"


def _checksum(body: bytes) -> bytes:
    return b"%08x" % zlib.crc32(body)


def _rollout(fields: dict[str, Any]) -> Rollout:
    fields["response_ids"] = tuple(fields["response_ids"])
    fields["logprobs"] = tuple(fields["logprobs"])
    versions = fields.get("weight_versions", ())  # earlier stores have none
    fields["weight_versions"] = tuple((version, count) for version, count in versions)
    fields.pop("correct", None)  # of earlier stores, which had no outcome: graded again when used
    outcome = fields.get("outcome")
    fields["outcome"] = None if outcome is None else Outcome(outcome)
    return Rollout(**fields)


def _write_all(descriptor: int, data: bytes) -> None:
    """Write all of ``data``: a full disk takes a part and refuses the rest at the next call."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _hold(descriptor: int, path: Path) -> None:
    """Lock the file for this process: two writers would cut each other's lines."""
    deadline = time.monotonic() + HOLD_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise RolloutError(
                    f"{path} is being written by another process: wait for it, or choose another "
                    "exp_manager.name"
                ) from error
            time.sleep(0.1)
        except OSError as error:  # some network file systems have no locks
            return logger.warning("%s cannot be locked (%s): start no second run", path, error)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
