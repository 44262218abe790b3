"""Pool of worker processes with a hard time limit a call: a worker that overruns it is killed.

A ``ProcessPoolExecutor`` cannot end one worker: a hanging call would cost the whole pool and what
the other workers were doing. Here each worker has its own pipe, and only the one that hangs goes.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import queue
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from nemo_paced.errors import GradingError

OUT_OF_MEMORY = 12  # exit status, ENOMEM
START_LIMIT_S = 120.0  # of a worker's start: imports of a verifier do not count as grading


class TimedOut(Exception):
    """The call took longer than its limit."""


class WorkerDied(Exception):
    """The worker's process ended during the call: out of memory, or killed."""


class VerifierPool:
    """Pool of processes that call a ``module:function``; several threads may use it.

    Args:
        target: the ``module:function``, importable in a new process. Its module may have a
            ``prepare_worker()``, which takes what time it needs before the first call.
        num_workers: processes at most; each starts when it is first needed.
        time_limit_s: of a call, seconds.
        memory_limit: of a worker's address space, bytes; ``None`` for no limit.
    """

    def __init__(
        self, target: str, *, num_workers: int, time_limit_s: float, memory_limit: int | None = None
    ) -> None:
        self.target = target
        self.num_workers = num_workers
        self.time_limit_s = time_limit_s
        self.memory_limit = memory_limit
        # an empty slot becomes a worker when it is first needed
        self._slots: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(num_workers):
            self._slots.put(None)

    def call(self, *arguments: Any) -> Any:
        """Result of the function for ``arguments``, computed by a free worker.

        Raises:
            TimedOut, WorkerDied: only this call is lost; the next one gets a new worker.
            GradingError: the function raised, or its worker did not start.
        """
        worker = self._slots.get()
        try:
            if worker is None:
                worker = _Worker(self.target, self.memory_limit)
            result = worker.ask(arguments, self.time_limit_s)
        except BaseException:
            if worker is not None:
                worker.kill()
            self._slots.put(None)
            raise
        self._slots.put(worker)
        return result

    def close(self) -> None:
        """Kill every worker; waits for calls under way, which end within their limit."""
        for _ in range(self.num_workers):
            worker = self._slots.get()
            if worker is not None:
                worker.kill()
        for _ in range(self.num_workers):
            self._slots.put(None)


class _Worker:
    def __init__(self, target: str, memory_limit: int | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, target, memory_limit), daemon=True
        )
        self._process.start()
        theirs.close()
        try:
            self._receive(START_LIMIT_S)
        except (TimedOut, WorkerDied) as error:
            self.kill()
            raise GradingError(
                f"a worker of the verifier {target} did not start: {error}"
            ) from None

    def ask(self, arguments: tuple[Any, ...], limit_s: float) -> Any:
        try:
            self._pipe.send(arguments)
        except OSError as error:
            raise WorkerDied("its worker is gone") from error
        ok, value = self._receive(limit_s)
        if not ok:
            raise GradingError(f"the verifier raised on {arguments!r:.300}:\n{value}")
        return value

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _receive(self, limit_s: float) -> tuple[bool, Any]:
        try:
            if not self._pipe.poll(limit_s):
                raise TimedOut(f"timed out after {limit_s:g} s")
            return self._pipe.recv()  # type: ignore[no-any-return]
        except (EOFError, OSError) as error:
            self._process.join(1)
            raise WorkerDied(f"its worker died (exit code {self._process.exitcode})") from error


def load_function(target: str) -> Callable[..., Any]:
    """The function behind ``module:function``.

    Raises:
        GradingError: there is none.
    """
    module, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise GradingError(
            f"grading.verifier is {target!r}: not math, exact or multiple_choice, and no function "
            f"module:function either ({error})"
        ) from error
    if not callable(function):
        raise GradingError(f"grading.verifier is {target!r}: {name} cannot be called")
    return function  # type: ignore[no-any-return]


def _serve(pipe: Connection, target: str, memory_limit: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent cleans up
    if memory_limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))
    function = load_function(target)
    prepare = getattr(sys.modules[function.__module__], "prepare_worker", None)
    if prepare is not None:
        prepare()
    pipe.send((True, None))
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:  # the parent is gone
            return
        try:
            answer = (True, function(*arguments))
        except MemoryError:
            os._exit(OUT_OF_MEMORY)  # there may be none left to say so
        except Exception:
            answer = (False, traceback.format_exc(limit=-3))
        pipe.send(answer)
