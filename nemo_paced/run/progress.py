"""Log and display of a run, on rank 0: metrics.jsonl, NeMo's loggers, a progress bar."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from nemo_paced.config import PacedConfig
from nemo_paced.run.config_file import METRICS_FILE
from nemo_paced.run.loggers import Loggers, open_loggers
from nemo_paced.run.metrics import MetricsFile

logger = logging.getLogger(__name__)

LINE_EVERY_S = 60.0  # between two lines of the log about something long, where no bar is drawn


def progress_bar(*, enabled: bool = True, transient: bool = False) -> Progress:
    """A progress bar: what is done, how far it is, how long it took and how long is left.

    It is drawn on a terminal only; elsewhere (a job's log file) :class:`RunLog` writes lines
    instead, and so do :func:`bar_task` and :func:`server_notes` of what takes longer than
    ``LINE_EVERY_S``.

    Args:
        transient: whether it disappears when it stops.
    """
    console = Console(file=sys.stderr)
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not (enabled and console.is_terminal),
        transient=transient,
    )


@contextmanager
def bar_task(
    bar: Progress, description: str, total: int | None
) -> Iterator[Callable[[int, int | None], None]]:
    """A task of the progress bar for the length of a ``with``; yields progress(done, total).

    Args:
        total: ``None`` where it is not known.
    """
    task = bar.add_task(description, total=total, note="")
    lines = _Lines(bar)

    def advance(done: int, of: int | None) -> None:
        bar.update(task, completed=done)
        if of is None:
            lines.say("%s: %d so far", description, done)
            return
        left = lines.passed_s() / done * (of - done) if done else 0.0
        lines.say("%s: %d of %d, about %.0f s left", description, done, of, left)

    try:
        yield advance
    finally:
        bar.remove_task(task)


@contextmanager
def watched(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar for the length of a ``with``, of which nothing is left; yields progress(done).

    Args:
        total: ``None`` where it is not known.
    """
    with progress_bar(transient=True) as bar, bar_task(bar, description, total) as advance:
        yield lambda done: advance(done, total)


def server_notes(bar: Progress) -> Callable[[str], None]:
    """A function that shows what starting servers say; an empty note ends the display."""
    task = bar.add_task("rollout server", total=None, note="", visible=False)
    lines: _Lines | None = None

    def show(note: str) -> None:
        nonlocal lines
        bar.update(task, note=note, visible=bool(note))
        if note:
            lines = lines or _Lines(bar)
            lines.say("%s", note)
        else:
            lines = None  # another start is one of its own

    return show


class _Lines:
    """Log lines of something long, at most one in ``LINE_EVERY_S``, where no bar is drawn."""

    def __init__(self, bar: Progress) -> None:
        self._wanted = bar.disable
        self._lock = threading.Lock()  # answers are handed over by several threads
        self._began = self._said = time.monotonic()

    def passed_s(self) -> float:
        return time.monotonic() - self._began

    def say(self, text: str, *values: object) -> None:
        with self._lock:
            now = time.monotonic()
            if not self._wanted or now - self._said < LINE_EVERY_S:
                return
            self._said = now
        logger.info(text, *values)


class RunLog:
    """Log of a run's steps: ``metrics.jsonl``, loggers and progress bar; a context manager.

    Args:
        first_step: optimizer steps taken before this start.
        enabled: ``False`` on ranks other than 0, where it does nothing.
    """

    def __init__(
        self, config: PacedConfig, run_dir: Path, first_step: int, *, enabled: bool
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.first_step = first_step
        self.enabled = enabled
        self.bar = progress_bar(enabled=enabled)
        self._loggers: Loggers | None = None
        self._train_task: TaskID | None = None
        self._began = 0.0

    def __enter__(self) -> RunLog:
        self.bar.start()
        if self.enabled:
            self._metrics = MetricsFile(self.run_dir / METRICS_FILE, next_step=self.first_step + 1)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.bar.stop()
        if self.enabled:
            self._metrics.close()
            if self._loggers is not None:
                self._loggers.close(failed=kind is not None)

    def open_loggers(self) -> None:
        """Open NeMo's loggers, unless they are open.

        Importing NeMo takes seconds: rank 0 does it while servers start.
        """
        if self.enabled and self._loggers is None:
            self._loggers = open_loggers(self.config, self.run_dir)

    def step(self, line: dict[str, Any]) -> None:
        """Record one step everywhere; the loggers get every n-th and each one with a validation."""
        if not self.enabled:
            return
        self._metrics.write(line)
        step, every = line["step"], self.config.trainer.log_every_n_steps
        if step % every == 0 or "validation/accuracy" in line:
            numbers = {k: float(v) for k, v in line.items() if isinstance(v, (int, float))}
            self.open_loggers()
            assert self._loggers is not None, "opened just now"
            self._loggers.log_metrics(numbers, step)
        self._advance(line)

    def finished(self) -> None:
        if self.enabled:
            logger.info("trained to step %d: %s", self.config.trainer.max_steps, self.run_dir)

    def _advance(self, line: dict[str, Any]) -> None:
        total = self.config.trainer.max_steps
        if self._train_task is None:
            self._began = time.monotonic() - line["time/step_s"]
            self._train_task = self.bar.add_task("train", total=total, note="", completed=0)
        note = f"{line['stage']} loss {line['loss']:.3f}"
        self.bar.update(self._train_task, completed=line["step"], note=note)
        done = line["step"] - self.first_step
        if self.bar.disable and (done % max(1, total // 10) == 0 or line["step"] == total):
            left = (time.monotonic() - self._began) / done * (total - line["step"])
            logger.info("step %d of %d: %s, %.0f s left", line["step"], total, note, left)
