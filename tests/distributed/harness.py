"""Runs a function on several gloo ranks of this machine, for tests."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

# what ranks import takes seconds: once here, and not in each of them
_PRELOAD = (
    "torch",
    "megatron.core",
    "nemo_paced.training.setup",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.auto.modeling_auto",
)


def run_ranks(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout_s: float = 150.0,
    grace_s: float = 0.5,
) -> list[Any]:
    """Results of ``fn(rank, world_size, *args)`` on each rank; ``fn`` is a module-level function.

    The environment variables of torchrun are set. A rank that raises ends all of them, after
    ``grace_s`` for the others to end by themselves, and its traceback is in the error; so does the
    time limit.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = _context()
        # The store listens here, on a port that the system chose: a port looked up for rank 0 to
        # listen on may be taken by then. torchrun's variables tell the ranks to join it.
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ranks = [
            context.Process(
                target=_rank_main, args=(rank, world_size, store.port, folder, fn, args)
            )
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.start()
        try:
            _wait(ranks, time.monotonic() + timeout_s, grace_s)
        finally:
            for rank in ranks:
                if rank.is_alive():
                    rank.kill()
                rank.join()
        failures = sorted(Path(folder).glob("*.error"))
        assert not failures, "\n".join(path.read_text() for path in failures)
        assert all(rank.exitcode == 0 for rank in ranks), [rank.exitcode for rank in ranks]
        return [
            torch.load(Path(folder) / f"{rank}.result", weights_only=False)
            for rank in range(world_size)
        ]


def _wait(ranks: list[Any], deadline: float, grace_s: float) -> None:
    failed = False
    while any(rank.is_alive() for rank in ranks):
        if not failed and any(rank.exitcode not in (None, 0) for rank in ranks):
            failed, deadline = True, time.monotonic() + grace_s
        if failed and time.monotonic() > deadline:
            return
        assert time.monotonic() < deadline, "the ranks did not finish in time"
        time.sleep(0.02)


def _context() -> Any:
    """A server that has torch imported forks the ranks: seconds less than spawn each.

    It forks no test process that holds threads. Where there is a GPU, what it imports begins to use
    that, and no fork may go on with it: ranks are spawned.
    """
    if torch.cuda.is_available():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOAD))
    return context


def _rank_main(
    rank: int, world_size: int, port: int, folder: str, fn: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    try:
        torch.save(fn(rank, world_size, *args), Path(folder) / f"{rank}.result")
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)  # the other ranks may wait in a collective


def assert_same_steps(losses: Any, expected: Any, *, first: float = 1e-5, later: float = 5e-5):
    """[step, (loss, gradient norm)] of another layout: only the order of float32 sums differs.

    Adam divides by the size of gradients and so makes more of that difference at each step; how
    much depends on the processor (1.2e-5 at the second step has been seen).
    """
    told, wanted = torch.as_tensor(losses), torch.as_tensor(expected)
    torch.testing.assert_close(told[0], wanted[0], rtol=first, atol=first)
    torch.testing.assert_close(told, wanted, rtol=later, atol=later)
