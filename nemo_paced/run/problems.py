"""Problem files of a run, read and checked once: a published one has up to a million rows.

``RUN/problems/KEY.json`` says of the file that the setting KEY names what was read and checked; an
Arrow file beside it holds the problems. Both are of use to the process that reads next, a resumed
run's above all, as long as the file's bytes and the settings that it was read with are the same.
"""

from __future__ import annotations

import hashlib
import json
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
from nemo_paced.files import digest, replacing, write_json
from nemo_paced.grading import answers
from nemo_paced.records import Problem
from nemo_paced.run.progress import watched

if TYPE_CHECKING:
    import pyarrow

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


def column(problems: Sequence[Problem], name: str) -> list[Any]:
    """A field of every problem, without making the problems of a table."""
    if isinstance(problems, ProblemTable):
        return problems.column(name)
    return [getattr(problem, name) for problem in problems]


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

    def read(self, path: str | Path, *, key: str, data: DataConfig) -> ProblemTable:
        """Problems of a file; what was noticed when it was read is logged.

        Args:
            path, key, data: see :func:`~nemo_paced.data.problems.each_problem`.

        Raises:
            ConfigError: see there; or the folder cannot be written to.
        """
        identity = _identity(path, key, data)
        place = self._folder / f"{key}.{identity[:16]}.arrow"
        found = self._index(key)
        table = _open(place) if found.get("identity") == identity else None
        if table is not None:
            contents = Contents(**found["contents"])
        else:
            contents = Contents()
            table = self._read_anew(path, place, contents, key=key, data=data)
            self._keep(key, {"identity": identity, "contents": asdict(contents), "checked": []})
        contents.tell(path)
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
        found = self._index(key)
        same = found.get("identity") == problems.identity
        if same and asked in found["checked"]:
            return
        with watched(f"checking {kind.value} prompts", len(problems)) as progress:
            prompts.check(problems, kind, progress)
        if same:
            self._keep(key, found | {"checked": [*found["checked"], asked]})

    def _read_anew(
        self, path: str | Path, place: Path, contents: Contents, *, key: str, data: DataConfig
    ) -> pyarrow.Table:
        import pyarrow

        problems = each_problem(path, contents, key=key, data=data)
        with watched(f"reading {key}", None) as progress:
            if not self._writes:
                memory = pyarrow.BufferOutputStream()
                _write(problems, memory, progress)
                return pyarrow.ipc.open_file(memory.getvalue()).read_all()
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                with replacing(place) as temporary:
                    _write(problems, str(temporary), progress)
            except OSError as error:
                raise ConfigError(f"{self._folder} cannot be written to: {error}") from error
        for earlier in set(self._folder.glob(f"{key}.*.arrow")) - {place}:
            earlier.unlink(missing_ok=True)
        return _open(place)

    def _keep(self, key: str, entry: dict[str, Any]) -> None:
        if self._writes:
            write_json(self._folder / f"{key}.json", entry)

    def _index(self, key: str) -> dict[str, Any]:
        """What is kept of a setting's file; empty where nothing is, or nothing that can be read."""
        try:
            found = json.loads((self._folder / f"{key}.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def _open(place: Path) -> pyarrow.Table | None:
    """The table of a file, without reading it; ``None``: there is none, or a damaged one."""
    import pyarrow

    try:
        return pyarrow.ipc.open_file(pyarrow.memory_map(str(place))).read_all()
    except (OSError, pyarrow.ArrowException):
        return None


def _identity(path: str | Path, key: str, data: DataConfig) -> str:
    """A digest of the bytes of a file, or of a pattern's files, and of what reads them."""
    files = paths_of(path, key=key)
    return digest(
        [
            [(each.suffix, _digest_of(each)) for each in files],
            [_digest_of(Path(str(module.__file__))) for module in _READERS],
            key == "data.problems",
            data.columns,
            data.duplicates.value,
            data.unanswered.value,
            keeps_instructions(data),
        ],
        digits=64,
    )


# what another release may do otherwise
_READERS = (problems, rows, schemas, answers, records, sys.modules[__name__])


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
