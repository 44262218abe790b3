"""Checkpoints through Megatron-Core's ``dist_checkpointing``: readable at any other layout.

A checkpoint directory ``checkpoints/step_00000100`` holds Megatron's sharded model, optimizer and
RNG state under their standard keys, and beside them

    paced.json            step, problems consumed, skipped steps, layout, configuration
    pass_rates.parquet    the table that the weights of the next step come from
    hf/                   configuration and tokenizer of the student: what ``export-hf`` needs

It is written under a temporary name and renamed when whole, so a directory with its final name is
complete. Older ones go only after that.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint.api import CheckpointException

from nemo_paced.errors import CheckpointError
from nemo_paced.hf.export_weights import check_new_directory, copy_metadata
from nemo_paced.parallel import Parallel
from nemo_paced.training.student import Student

logger = logging.getLogger(__name__)

STATE_FILE = "paced.json"
PASS_RATES_FILE = "pass_rates.parquet"
HF_FOLDER = "hf"
# torch's own is no Exception
_FAILURES = (Exception, CheckpointException)


@dataclass(frozen=True, slots=True)
class RunState:
    """What a run needs to go on, beyond tensors.

    Attributes:
        step: optimizer steps taken.
        consumed_problems: position in the endless sequence of problems.
        skipped_steps: steps without an update, because of NaN or Inf.
        config: the resolved configuration, as plain data.
        layout: tensor x pipeline ranks; the RNG state is restored only at the same layout.
    """

    step: int
    consumed_problems: int
    skipped_steps: int
    config: dict[str, Any]
    layout: tuple[int, int]


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (run_dir / "checkpoints").glob("step_????????")
    return sorted(path for path in found if (path / STATE_FILE).exists())


def save(
    run_dir: Path,
    student: Student,
    state: RunState,
    parallel: Parallel,
    *,
    hf_dir: Path,
    keep: int,
) -> Path:
    """Write the checkpoint of ``state.step``; collective. Keeps the newest ``keep`` (-1: all).

    Raises:
        CheckpointError: it could not be written (a full disk, say); earlier ones are untouched.
    """
    final = checkpoint_dir(run_dir, state.step)
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        if parallel.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        torch.distributed.barrier()
        dist_checkpointing.save(_sharded_state(student, parallel, loading=False), str(temporary))
        if parallel.rank == 0:
            _write_beside(temporary, run_dir, state, hf_dir)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
    except _FAILURES as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {final} could not be written: {_reason(error)}. Checkpoints written "
            "before it are whole; free space or choose another exp_manager.exp_dir, then start "
            "the same command again"
        ) from error
    torch.distributed.barrier()
    if parallel.rank == 0 and keep > 0:
        for old in checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old)
    return final


def load(directory: Path, student: Student, parallel: Parallel) -> RunState:
    """Restore model, optimizer and RNG from ``directory``, at whatever layout it was written."""
    state = read_state(directory)
    same_layout = state.layout == (parallel.tp_size, parallel.pp_size)
    wanted = _sharded_state(student, parallel, loading=True, with_rng=same_layout)
    loaded = _load(wanted, directory)
    student.gpt.load_state_dict(loaded["model"])
    _complete_steps(loaded["optimizer"])
    student.optimizer.load_state_dict(loaded["optimizer"])
    student.optimizer.reload_model_params()
    if same_layout:
        _set_rng_state(loaded["rng_state"])
    return state


def load_model(directory: Path, gpt: GPTModel) -> None:
    """Restore the weights alone, at whatever layout they were written."""
    loaded = _load({"model": gpt.sharded_state_dict()}, directory)
    gpt.load_state_dict(loaded["model"])


def save_model(directory: Path, gpt: GPTModel, hf_dir: Path, parallel: Parallel) -> None:
    """Write a checkpoint of weights alone (``import-hf``): a start, not a run to resume.

    Collective; under a temporary name first, which a later start replaces.

    Raises:
        CheckpointError: it could not be written, or ``directory`` exists and is not empty.
    """
    check_new_directory(directory, parallel)
    temporary = directory.with_name(f".{directory.name}.tmp")
    try:
        if parallel.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            copy_metadata(hf_dir, temporary / HF_FOLDER)
        torch.distributed.barrier()
        dist_checkpointing.save({"model": gpt.sharded_state_dict()}, str(temporary))
        if parallel.rank == 0:
            if directory.exists():
                directory.rmdir()
            temporary.rename(directory)
    except _FAILURES as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{directory} could not be written: {_reason(error)}") from error
    torch.distributed.barrier()


def read_state(directory: Path) -> RunState:
    """The ``paced.json`` of a checkpoint.

    Raises:
        CheckpointError: it is missing or cannot be read.
    """
    path = directory / STATE_FILE
    try:
        fields = json.loads(path.read_text())
        return RunState(**{**fields, "layout": tuple(fields["layout"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({_reason(error)}): {directory} is not a complete checkpoint "
            "of a run; remove it to resume from the one before"
        ) from error


def _write_beside(directory: Path, run_dir: Path, state: RunState, hf_dir: Path) -> None:
    copy_metadata(hf_dir, directory / HF_FOLDER)
    table = run_dir / PASS_RATES_FILE
    if table.exists():
        shutil.copy2(table, directory / PASS_RATES_FILE)
    (directory / STATE_FILE).write_text(json.dumps(asdict(state), indent=1) + "\n")


def _sharded_state(
    student: Student, parallel: Parallel, *, loading: bool, with_rng: bool = True
) -> dict[str, Any]:
    model = student.gpt.sharded_state_dict()
    state = {
        "model": model,
        # a run that has not updated yet has no moments: let Megatron make them as for loading
        "optimizer": student.optimizer.sharded_state_dict(
            model, is_loading=loading or not student.has_moments
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


def _load(wanted: dict[str, Any], directory: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(wanted, str(directory))
    except _FAILURES as error:
        raise CheckpointError(
            f"checkpoint {directory} cannot be loaded: {_reason(error)}. It may be damaged or of "
            "another model; remove it to resume from the one before"
        ) from error


def _complete_steps(optimizer: dict[str, Any]) -> None:
    """A step count of 0 is left out when saving, and torch's Adam asks for it when loading."""
    # with experts, theirs and that of the other layers are two optimizers, numbered
    for one in optimizer.values() if 0 in optimizer else [optimizer]:
        state = one.get("optimizer", one)["state"]
        state.setdefault("common_step", torch.tensor(0.0))


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
    """One line that says what was wrong, out of what wraps it."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:300]}"
