"""Checkpoint directories of a run: which there are, whether they are whole, which are kept."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_paced.config import CheckpointCallbackParams, PacedConfig
from nemo_paced.errors import CheckpointError, PacedError
from nemo_paced.run.fingerprint import check_config, check_shards

logger = logging.getLogger(__name__)

STATE_FILE = "paced.json"
SIZES_FILE = "files.json"


@dataclass(frozen=True, slots=True)
class RunState:
    """What a run needs to go on beyond tensors: the content of ``paced.json``.

    Attributes:
        step: optimizer steps taken.
        consumed_problems: position in the endless sequence of problems.
        skipped_steps: steps without an update, because of NaN or Inf.
        config: the resolved configuration, as plain data.
        layout: tensor x pipeline ranks; the RNG state is restored only at the same layout.
        accuracy: validation/accuracy after ``step``; ``None``: not validated then.
        fully_reshardable: the optimizer's state is readable with other tensor, pipeline or expert
            ranks than those of ``config``, and not with other data-parallel ranks alone.
    """

    step: int
    consumed_problems: int
    skipped_steps: int
    config: dict[str, Any]
    layout: tuple[int, int]
    accuracy: float | None = None
    fully_reshardable: bool = True  # as all were before it was written down


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (run_dir / "checkpoints").glob("step_????????")
    return sorted(path for path in found if (path / STATE_FILE).exists())


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
            f"{path} cannot be read ({error}): {directory} is not a complete checkpoint "
            "of a run; remove it to resume from the one before"
        ) from error


def record_sizes(directory: Path) -> None:
    """Write how long each file is to ``files.json``, the last file of a checkpoint."""
    sizes = {
        str(path.relative_to(directory)): path.stat().st_size
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    (directory / SIZES_FILE).write_text(json.dumps(sizes, indent=1) + "\n")


def damage(directory: Path) -> str | None:
    """The first fault of a checkpoint's files, in words; ``None``: they are as they were written.

    Lengths are compared, not contents: reading a large checkpoint takes as long as loading it.
    """
    try:
        sizes = json.loads((directory / SIZES_FILE).read_text())
        read_state(directory)
    except (OSError, ValueError, CheckpointError) as error:
        return str(error)
    for name, size in sizes.items():
        path = directory / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
    return None


def newest_whole(run_dir: Path) -> Path | None:
    """The newest checkpoint that can be resumed from; damaged ones are named and passed over."""
    folder = run_dir / "checkpoints"
    for left in sorted({*folder.glob(".step_*.tmp"), *folder.glob("step_????????")}):
        if left not in checkpoints(run_dir):
            logger.warning("%s is no whole checkpoint: passed over, and safe to remove", left)
    for directory in reversed(checkpoints(run_dir)):
        found = damage(directory)
        if found is None:
            return directory
        logger.warning("checkpoint %s is damaged (%s): trying the one before", directory, found)
    return None


def find_checkpoint(source: Path) -> Path:
    """``source`` itself if it is a checkpoint, else the newest whole one of the run directory.

    Raises:
        CheckpointError: there is none.
    """
    if (source / "metadata.json").exists():  # Megatron's; a run directory may hold an export hf/
        return source
    found = newest_whole(source)
    if found is None:
        raise CheckpointError(
            f"{source} is no checkpoint and holds no whole one: give RUN/checkpoints/step_... or a "
            "run directory"
        )
    return found


def newest_checkpoint(config: PacedConfig, run_dir: Path) -> Path | None:
    """The checkpoint to resume from, after checking that its run was configured alike.

    Raises:
        PacedError: there is one, and ``exp_manager.resume_if_exists`` is false.
        CheckpointError: none is whole, or a setting that decides the result differs.
    """
    if not checkpoints(run_dir):
        return None
    if not config.exp_manager.resume_if_exists:
        raise PacedError(
            f"{run_dir} holds checkpoints and exp_manager.resume_if_exists is false: choose "
            "another exp_manager.name, or let it resume"
        )
    found = newest_whole(run_dir)
    if found is None:
        raise CheckpointError(
            f"none of the checkpoints of {run_dir} is whole: remove them to start anew, or choose "
            "another exp_manager.name"
        )
    state = read_state(found)
    check_config(state.config, config, found)
    if not state.fully_reshardable:
        check_shards(state.config, config, found)
    return found


def steps_trained(config: PacedConfig, run_dir: Path) -> int:
    """The step of the :func:`newest_checkpoint`, which may raise; 0 where there is none."""
    found = newest_checkpoint(config, run_dir)
    return 0 if found is None else read_state(found).step


def prune(run_dir: Path, keep: CheckpointCallbackParams) -> None:
    """Remove complete checkpoints but the newest ``save_top_k`` and the best ``save_best_k``.

    The best are those of the highest validation accuracy.
    """
    found = checkpoints(run_dir)
    if keep.save_top_k == -1:
        return
    kept = set(found[-keep.save_top_k :])
    judged = [(read_state(path).accuracy, path) for path in found]
    best = sorted((accuracy, path) for accuracy, path in judged if accuracy is not None)
    kept |= {path for _, path in best[max(0, len(best) - keep.save_best_k) :]}
    for path in found:
        if path not in kept:
            shutil.rmtree(path)
