"""Checkpoints through Megatron-Core's ``dist_checkpointing``: weights readable at any layout.

A checkpoint directory ``checkpoints/step_00000100`` holds Megatron's sharded model, optimizer and
RNG state under their standard keys, and beside them

    paced.json            step, problems consumed, skipped steps, layout, configuration
    pass_rates.parquet    the table that the weights of the next step come from
    hf/                   configuration and tokenizer of the student: what ``export-hf`` needs
    files.json            how long each file is: what is shorter when read is not resumed from

It is written under a temporary name and renamed when whole, so a directory with its final name is
complete. Older ones go only after that.

The optimizer's state is written in the shards of Megatron's distributed optimizer, by each rank
its own, which other numbers of data-parallel ranks can read; or, where the settings ask for it,
gathered into one tensor a parameter, which any layout can.
"""

from __future__ import annotations

import inspect
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from nemo_paced.config import CheckpointCallbackParams
from nemo_paced.errors import CheckpointError
from nemo_paced.hf.export_weights import check_new_directory, copy_metadata
from nemo_paced.parallel.groups import Parallel
from nemo_paced.run.checkpoint_files import (
    STATE_FILE,
    RunState,
    checkpoint_dir,
    prune,
    read_state,
    record_sizes,
)
from nemo_paced.run.config_file import PASS_RATES_FILE
from nemo_paced.run.fingerprint import RESHARD
from nemo_paced.student.model import Student
from nemo_paced.student.optimizer import chained, complete_state, state_restored

logger = logging.getLogger(__name__)

HF_FOLDER = "hf"
# Later Megatrons write through another package unless told otherwise.
_OWN_WRITER: dict[str, Any] = (
    {"async_strategy": "mcore"}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    else {}
)
# torch's CheckpointException is no Exception
_FAILURES = (Exception, CheckpointException)


def save(
    run_dir: Path,
    student: Student,
    state: RunState,
    parallel: Parallel,
    *,
    hf_dir: Path,
    keep: CheckpointCallbackParams,
    background: AsyncCallsQueue | None = None,
) -> None:
    """Write the checkpoint of ``state.step``; collective.

    Args:
        hf_dir: the student's Hugging Face directory, whose configuration and tokenizer are copied.
        keep: how many checkpoints stay, once this one is whole; whether any layout can read the
            optimizer's state.
        background: write there and return; it is whole after ``finish`` only.

    Raises:
        CheckpointError: it could not be written (a full disk, say); earlier ones are untouched.
    """
    final = checkpoint_dir(run_dir, state.step)
    temporary = final.with_name(f".{final.name}.tmp")
    reshardable = keep.fully_reshardable or not _every_rank_has_shards(student, parallel)
    state = replace(state, fully_reshardable=reshardable)

    def complete() -> None:
        if parallel.rank == 0:
            record_sizes(temporary)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            prune(run_dir, keep)

    with _explained(final, temporary):
        if parallel.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        torch.distributed.barrier()
        request = dist_checkpointing.save(
            _sharded_state(student, parallel, loading=False, fully_reshardable=reshardable),
            str(temporary),
            async_sharded_save=background is not None,
            **_OWN_WRITER,
        )
        if parallel.rank == 0:
            _write_beside(temporary, run_dir, state, hf_dir)
        if request is None:
            complete()
        else:
            assert background is not None, "only a background write makes a request"
            request.add_finalize_fn(complete)
            background.schedule_async_request(request)
    torch.distributed.barrier()


def finish(background: AsyncCallsQueue, *, wait: bool) -> None:
    """Make the background's checkpoints whole whose files are written; collective.

    Args:
        wait: whether to wait for those that are not written yet.

    Raises:
        CheckpointError: one could not be written.
    """
    with _explained(Path("in the background")):
        background.maybe_finalize_async_calls(blocking=wait)


@contextmanager
def _explained(final: Path, temporary: Path | None = None) -> Iterator[None]:
    try:
        yield
    except _FAILURES as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {final} could not be written: {_reason(error)}. Checkpoints written "
            "before it are whole; free space or choose another exp_manager.exp_dir, then start "
            "the same command again"
        ) from error


def load(directory: Path, student: Student, parallel: Parallel) -> RunState:
    """Restore model, optimizer and RNG from ``directory``; collective.

    The RNG state is restored only at the layout that wrote it.

    Raises:
        CheckpointError: it is damaged, of another model, or in the optimizer's shards of a layout
            that this one's are not made of.
    """
    state = read_state(directory)
    same_layout = state.layout == (parallel.tp_size, parallel.pp_size)
    wanted = _sharded_state(
        student,
        parallel,
        loading=True,
        fully_reshardable=state.fully_reshardable,
        with_rng=same_layout,
    )
    loaded = _load(wanted, directory)
    _load_chunks(student.chunks, loaded["model"])
    try:
        # fp32 weights are themselves the optimizer's: Megatron copies into them
        with torch.no_grad(), state_restored(student.optimizer):
            student.optimizer.load_state_dict(loaded["optimizer"])
    except AssertionError as error:  # Megatron's, of buckets of other sizes
        raise CheckpointError(
            f"the optimizer's state in {directory} does not fit this layout ({_reason(error)}). "
            f"Start with the layout that wrote it; {RESHARD}"
        ) from error
    if same_layout:
        _set_rng_state(loaded["rng_state"])
    return state


def load_model(directory: Path, chunks: Sequence[GPTModel]) -> None:
    """Restore the weights alone, whatever layout wrote them; collective.

    Raises:
        CheckpointError: they are damaged, or of another model.
    """
    loaded = _load({"model": _sharded_chunks(chunks)}, directory)
    _load_chunks(chunks, loaded["model"])


def save_model(
    directory: Path, chunks: Sequence[GPTModel], hf_dir: Path, parallel: Parallel
) -> None:
    """Write a checkpoint of weights alone (``import-hf``): a start, not a run to resume.

    It is collective, and written under a temporary name first, which a later start replaces.

    Raises:
        CheckpointError: it could not be written, or ``directory`` exists and is not empty.
    """
    check_new_directory(directory, parallel)
    temporary = directory.with_name(f".{directory.name}.tmp")
    try:
        if parallel.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        torch.distributed.barrier()
        # into an empty folder: Megatron warns of remains otherwise
        dist_checkpointing.save({"model": _sharded_chunks(chunks)}, str(temporary), **_OWN_WRITER)
        if parallel.rank == 0:
            copy_metadata(hf_dir, temporary / HF_FOLDER)
            if directory.exists():
                directory.rmdir()
            temporary.rename(directory)
    except _FAILURES as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{directory} could not be written: {_reason(error)}") from error
    torch.distributed.barrier()


def _write_beside(directory: Path, run_dir: Path, state: RunState, hf_dir: Path) -> None:
    copy_metadata(hf_dir, directory / HF_FOLDER)
    table = run_dir / PASS_RATES_FILE
    if table.exists():
        shutil.copy2(table, directory / PASS_RATES_FILE)
    (directory / STATE_FILE).write_text(json.dumps(asdict(state), indent=1) + "\n")


def _sharded_state(
    student: Student,
    parallel: Parallel,
    *,
    loading: bool,
    fully_reshardable: bool,
    with_rng: bool = True,
) -> dict[str, Any]:
    student.sync_parameters()
    model = _sharded_chunks(student.chunks)
    complete_state(student.optimizer)
    state = {
        "model": model,
        "optimizer": student.optimizer.sharded_state_dict(
            model,
            # while saving Megatron would put zeros in place of the master weights
            is_loading=loading,
            metadata={
                "distrib_optim_sharding_type": (
                    "fully_reshardable" if fully_reshardable else "dp_reshardable"
                )
            },
        ),
    }
    if with_rng:
        state["rng_state"] = ShardedObject(
            "rng_state",
            _rng_state(),
            (parallel.pp_size, parallel.tp_size),
            (parallel.pp_rank, parallel.tp_rank),
            replica_id=parallel.groups.dp_cp.rank(),
        )
    return state


def _every_rank_has_shards(student: Student, parallel: Parallel) -> bool:
    """Whether Megatron can write the optimizer's state in its shards; collective.

    It asks every rank for a parameter in each bucket: a bucket of few numbers, padded for many
    data-parallel ranks, leaves some without.
    """
    optimizers = chained(student.optimizer)
    has = all(isinstance(each, DistributedOptimizer) for each in optimizers) and all(
        bucket["param_map"]
        for each in optimizers
        for by_dtype in each.gbuf_ranges
        for buckets in by_dtype.values()
        for bucket in buckets
    )
    lacking = torch.tensor(int(not has), device=parallel.device)
    torch.distributed.all_reduce(lacking)
    return not lacking.item()


def _sharded_chunks(chunks: Sequence[GPTModel]) -> dict[str, Any]:
    """Megatron's sharded state by chunk; on disk, keys count the whole model's layers instead.

    Transformer Engine's layers have more of it than Megatron's own, the scales of FP8 training: it
    is left out, so that each reads what the other has written.
    """
    return {
        str(number): {
            key: value
            for key, value in chunk.sharded_state_dict().items()
            if not _is_extra_state(key)
        }
        for number, chunk in enumerate(chunks)
    }


def _load_chunks(chunks: Sequence[GPTModel], loaded: dict[str, Any]) -> None:
    for number, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(loaded[str(number)], strict=False)
        wrong = [key for key in (*missing, *unexpected) if not _is_extra_state(key)]
        assert not wrong, f"a checkpoint is read by the names of this very model, not {wrong}"


def _is_extra_state(key: str) -> bool:
    return key.rpartition(".")[2].startswith("_extra_state")


def _load(wanted: dict[str, Any], directory: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(wanted, str(directory))
    except _FAILURES as error:
        raise CheckpointError(
            f"checkpoint {directory} cannot be loaded: {_reason(error)}. It may be damaged or of "
            "another model; remove it to resume from the one before"
        ) from error


def _rng_state() -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state()}
    tracker = tensor_parallel.get_cuda_rng_tracker()
    state["tracker"] = tracker.get_states()
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _reason(error: BaseException) -> str:
    """One line that says what was wrong, taken out of the error that wraps it."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:300]}"
