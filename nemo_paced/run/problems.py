"""Problem files of a run, read and checked once: a published one has up to a million rows.

Of each file that a setting KEY names, ``RUN/problems/KEY.IDENTITY.arrow`` holds the problems, and
a JSON file beside it says what was noticed and which prompts were checked. The identity is a digest
of the file's bytes and of what reads them: the process that reads next, a resumed run's above all,
has only to find it.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from nemo_paced import records
from nemo_paced.config import DataConfig
from nemo_paced.data import problems, rows, schemas
from nemo_paced.data.problems import Contents, each_problem, keeps_instructions
from nemo_paced.data.prompts import PromptKind, Prompts
from nemo_paced.data.rows import paths_of
from nemo_paced.errors import ConfigError
from nemo_paced.files import digest, file_digest, replacing, write_json
from nemo_paced.grading import evidence
from nemo_paced.records import Problem
from nemo_paced.run.progress import watched

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

FOLDER = "problems"
BATCH = 4096  # rows that are written at once
FIELDS = ("id", "problem", "answer", "solution", "group", "accepted")


class ProblemTable(Sequence[Problem]):
    """Problems in an Arrow table, made when they are asked for.

    Of a table that lies in a file, memory holds what was asked for.

    Attributes:
        identity: a digest of the file's bytes and of what it was read with.
    """

    def __init__(self, table: pyarrow.Table, identity: str) -> None:
        self._table = table
        self.identity = identity

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, index: int) -> Problem: ...

    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...

    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"problem {index} of {len(self)}")
        return _problem({name: self._table.column(name)[at].as_py() for name in FIELDS})

    def __iter__(self) -> Iterator[Problem]:
        for batch in self._table.select(FIELDS).to_batches(BATCH):
            for row in batch.to_pylist():
                yield _problem(row)

    def column(self, name: str) -> list[Any]:
        """A field of every problem; ``digest`` is that of its content."""
        values: list[Any] = self._table.column(name).to_pylist()
        return values

    def ids_without(self, name: str) -> list[str]:
        """Ids of the problems of which a field is ``None``."""
        values = self._table.column(name)
        if not values.null_count:
            return []
        ids: list[str] = self._table.column("id").filter(values.is_null()).to_pylist()
        return ids


def column(problems: Sequence[Problem], name: str) -> list[Any]:
    """A field of every problem, without making the problems of a table."""
    if isinstance(problems, ProblemTable):
        return problems.column(name)
    return [getattr(problem, name) for problem in problems]


def ids_without(problems: Sequence[Problem], name: str) -> list[str]:
    """Ids of the problems of which a field is ``None``."""
    if isinstance(problems, ProblemTable):
        return problems.ids_without(name)
    return [problem.id for problem in problems if getattr(problem, name) is None]


def digests(problems: Sequence[Problem]) -> dict[str, str]:
    """Digest of each problem's content by its id."""
    if isinstance(problems, ProblemTable):
        return dict(zip(problems.column("id"), problems.column("digest"), strict=True))
    return {problem.id: digest(problem.content()) for problem in problems}


class RunProblems:
    """Reads problem files and checks prompts, or finds in a run directory that it was done.

    Args:
        writes: whether what is new is kept there; ``False`` leaves the disk as it is.
    """

    def __init__(self, run_dir: Path, *, writes: bool = True) -> None:
        self._folder = run_dir / FOLDER
        self._writes = writes

    def read(
        self, path: str | Path, *, key: str, data: DataConfig, tells: bool = False
    ) -> ProblemTable:
        """Problems of a file.

        Args:
            path, key, data: see :func:`~nemo_paced.data.problems.each_problem`.
            tells: whether what was noticed when it was read is logged.

        Raises:
            ConfigError: see there; or the folder cannot be written to.
        """
        files = paths_of(path, key=key)
        identity = _identity(files, key, data)
        found = self._entry(key, identity)
        table = _open(self._place(key, identity)) if found else None
        if table is None:
            contents = Contents()
            table = self._read_anew(path, identity, contents, key=key, data=data)
            found = {"files": list(map(str, files)), "contents": asdict(contents), "checked": []}
            try:
                self._keep(key, identity, found)
            except OSError as error:
                raise self._unwritable(error) from error
        if tells:
            contents = Contents(**found["contents"])
            contents.tell(path, moved=dict(zip(found["files"], map(str, files), strict=True)))
        return ProblemTable(table, identity)

    def check(
        self, problems: ProblemTable, prompts: Prompts, kind: PromptKind, *, key: str
    ) -> None:
        """Refuse problems whose prompts are too long, unless they were found to fit.

        Args:
            key: the setting that named their file.

        Raises:
            ConfigError: see :meth:`Prompts.check`.
        """
        asked = prompts.identity(kind)
        found = self._entry(key, problems.identity)
        if found and asked in found["checked"]:
            return
        with watched(f"checking {kind.value} prompts", len(problems)) as progress:
            prompts.check(problems, kind, progress)
        if found:
            try:
                checked = [*found["checked"], asked]
                self._keep(key, problems.identity, found | {"checked": checked})
            except OSError as error:
                logger.warning("%s; prompts will be checked again", self._unwritable(error))

    def remove_others(self, problems: ProblemTable, *, key: str) -> None:
        """Remove what is kept of other files of a setting, which is not this run's."""
        mine = f"{key}.{problems.identity[:16]}."
        for path in (*self._folder.glob(f"{key}.*"), *self._folder.glob(f".{key}.*.tmp")):
            if not path.name.startswith(mine):
                path.unlink(missing_ok=True)

    def _read_anew(
        self, path: str | Path, identity: str, contents: Contents, *, key: str, data: DataConfig
    ) -> pyarrow.Table:
        import pyarrow

        problems = each_problem(path, contents, key=key, data=data)
        with watched(f"reading {key}", None) as progress:
            if not self._writes:
                memory = pyarrow.BufferOutputStream()
                _write(problems, memory, progress)
                return pyarrow.ipc.open_file(memory.getvalue()).read_all()
            place = self._place(key, identity)
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                with replacing(place) as temporary:
                    _write(problems, str(temporary), progress)
            except OSError as error:
                raise self._unwritable(error) from error
        table = _open(place)
        if table is None:
            raise ConfigError(f"{place} was written and cannot be read: is the disk sound?")
        return table

    def _place(self, key: str, identity: str, suffix: str = "arrow") -> Path:
        return self._folder / f"{key}.{identity[:16]}.{suffix}"

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self._folder} cannot be written to: {error}")

    def _keep(self, key: str, identity: str, entry: dict[str, Any]) -> None:
        if self._writes:
            write_json(self._place(key, identity, "json"), entry)

    def _entry(self, key: str, identity: str) -> dict[str, Any]:
        """What is kept of a file; empty where nothing is, or nothing that can be read."""
        try:
            found = json.loads(self._place(key, identity, "json").read_text())
        except (OSError, ValueError):
            return {}
        whole = isinstance(found, dict) and found.keys() == {"files", "contents", "checked"}
        return found if whole else {}


def _open(place: Path) -> pyarrow.Table | None:
    """The table of a file, without reading it; ``None``: there is none, or a damaged one."""
    import pyarrow

    for opened in (pyarrow.memory_map, pyarrow.OSFile):  # some file systems cannot map
        try:
            return pyarrow.ipc.open_file(opened(str(place))).read_all()
        except (OSError, pyarrow.ArrowException):
            continue
    return None


def _identity(files: Sequence[Path], key: str, data: DataConfig) -> str:
    """A digest of the bytes of files, and of what reads them."""
    try:
        bytes_ = [(each.suffix, file_digest(each)) for each in files]
    except OSError as error:
        raise ConfigError(f"{key}: {error.filename} cannot be read: {error.strerror}") from error
    return digest(
        [
            bytes_,
            [file_digest(str(module.__file__)) for module in _READERS],
            key == "data.problems",
            data.columns,
            data.duplicates.value,
            data.unanswered.value,
            keeps_instructions(data),
        ],
        digits=64,
    )


# what another release may do otherwise
_READERS = (problems, rows, schemas, evidence, records, sys.modules[__name__])


def _write(problems: Iterator[Problem], sink: Any, progress: Callable[[int], None]) -> None:
    import pyarrow

    text = pyarrow.string()
    kinds = dict.fromkeys(FIELDS, text) | {"accepted": pyarrow.list_(text), "digest": text}
    schema = pyarrow.schema(kinds)
    done = 0
    with pyarrow.ipc.new_file(sink, schema) as writer:
        while batch := list(islice(problems, BATCH)):
            columns: dict[str, list[Any]] = {
                name: [getattr(problem, name) for problem in batch] for name in FIELDS
            }
            columns["digest"] = [digest(problem.content()) for problem in batch]
            writer.write_batch(pyarrow.RecordBatch.from_pydict(columns, schema=schema))
            done += len(batch)
            progress(done)


def _problem(row: dict[str, Any]) -> Problem:
    return Problem(**row | {"accepted": tuple(row["accepted"])})
