"""``metrics.jsonl``: one line a step, and nothing of steps that a resumed run takes again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_paced.files import without_nan, write_whole


class MetricsFile:
    """Append-only JSON lines; a resumed run first drops the lines of steps it will repeat.

    Args:
        next_step: the lowest ``step`` of the lines that will be written.
    """

    def __init__(self, path: Path, *, next_step: int) -> None:
        self.path = path
        if path.exists():
            kept = [line for line in _complete_lines(path) if json.loads(line)["step"] < next_step]
            write_whole(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a")

    def write(self, values: dict[str, Any]) -> None:
        """Append one line; NaN becomes null, as JSON has none."""
        self._file.write(json.dumps(without_nan(values)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _complete_lines(path: Path) -> list[str]:
    """Lines that end in a newline: a killed run may leave half of one."""
    return [line[:-1] for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
