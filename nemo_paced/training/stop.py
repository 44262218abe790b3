"""Stopping a run on request: SLURM's warning before the time limit, or SIGTERM.

The warning is SIGUSR1. Its receiver is a thread: the signal is blocked everywhere else, so that the
helpers of a rank (rollout server, graders, checkpoint writers), which inherit that, outlive a
warning that SLURM sends to every process of a step. Rank 0 decides where to stop: at the next
message that the others wait for (``exchange.py``), so all stop at the same step. While it samples,
which may take hours, it is interrupted; what was sampled is in the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

WARNING = signal.SIGUSR1
_KNOCK = signal.SIGUSR2  # interrupts the main thread; sent by a thread of this process
_POLL_S = 0.2

_requested = threading.Event()
_interruptible = False  # written by the main thread alone


class StopRequested(KeyboardInterrupt):
    """The run is to stop; a KeyboardInterrupt, so that no handler of errors takes it for one."""


def block_warning() -> None:
    """Block the warning until a receiver takes it; main thread, before it starts others."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {WARNING})


def listen() -> None:
    """Take SIGUSR1 and SIGTERM as requests from now on; main thread, before it starts others.

    A second SIGTERM ends the process.
    """
    block_warning()
    signal.signal(_KNOCK, _take)
    signal.signal(signal.SIGTERM, _take)
    for work in (_receive, _knock):
        threading.Thread(target=work, daemon=True, name="stop request").start()


def leave() -> None:
    """Ignore SIGTERM from now on: this rank has stopped and will end by itself.

    The first rank that ends with a status above 0 makes srun and torchrun terminate the others,
    whose status would then be that of the signal.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def pass_on(module: str) -> None:
    """Hand warnings to the child processes that run ``python -m module``; after block_warning."""

    def forward() -> None:
        while True:
            signal.sigwait({WARNING})
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if module in child.cmdline():
                        child.send_signal(WARNING)

    threading.Thread(target=forward, daemon=True, name="stop request").start()


def requested() -> bool:
    return _requested.is_set()


@contextmanager
def interruptible() -> Iterator[None]:
    """Context for work of the main thread that a request may break off, at any place.

    Raises:
        StopRequested: now, if it was requested before.
    """
    global _interruptible
    _interruptible = True
    try:
        if _requested.is_set():
            raise StopRequested
        yield
    except asyncio.CancelledError:
        if not _requested.is_set():
            raise
        raise StopRequested from None
    finally:
        _interruptible = False


def _receive() -> None:
    _leave_other_signals()
    # Not sigtimedwait: in a process that was suspended (Ctrl-Z, scontrol suspend) and goes on after
    # that time, CPython's returns a signal that nobody sent.
    signal.sigwait({WARNING})
    _requested.set()


def _knock() -> None:
    _leave_other_signals()
    main = threading.main_thread().ident
    assert main is not None, "it runs"
    _requested.wait()
    while True:  # a signal just before the main thread falls asleep is not noticed: send another
        if _interruptible:
            signal.pthread_kill(main, _KNOCK)
        time.sleep(_POLL_S)


def _leave_other_signals() -> None:
    """Block all signals in this thread, which leaves them to other threads."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def _take(number: int, frame: FrameType | None) -> None:
    global _interruptible
    _requested.set()
    if number == signal.SIGTERM:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if _interruptible:
        _interruptible = False  # once: what follows is cleaning up
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise StopRequested from None
        # Were it raised here, between two callbacks of the loop, one of them could be lost, and
        # cleaning up would wait for it for ever.
        loop.call_soon_threadsafe(_cancel_all, loop)


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()
