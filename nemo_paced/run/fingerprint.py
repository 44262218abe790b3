"""Checks that the configuration and data of a run are those it was started with, when it resumes.

Where they are not, the error names the difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_paced.config import PacedConfig, to_dict
from nemo_paced.errors import CheckpointError
from nemo_paced.records import Problem
from nemo_paced.run.config_file import leaves
from nemo_paced.run.problems import digests

DATA_FILE = "data_fingerprint.json"

# Settings that may change when a run resumes: where it computes and what it logs, not what it
# computes.
CHANGEABLE = (
    "trainer.num_nodes",
    "trainer.devices",
    "trainer.accelerator",
    "trainer.val_check_interval",
    "trainer.log_every_n_steps",
    "exp_manager",
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.context_parallel_size",
    "model.expert_model_parallel_size",
    "model.virtual_pipeline_model_parallel_size",
    "model.sequence_parallel",
    "model.micro_batch_size",
    "model.packed_sequence_size",
    "model.recompute_granularity",
    "model.recompute_num_layers",
    "model.optim.backend",
    "model.optim.overlap_grad_reduce",
    "model.optim.overlap_param_gather",
    "model.make_vocab_size_divisible_by",
    "teacher.micro_batch_size",
    "teacher.tensor_model_parallel_size",
    "teacher.pipeline_model_parallel_size",
    "teacher.expert_model_parallel_size",
    "teacher.placement",
    "teacher.separate_ranks",
    "student.hf_path",
    "teacher.hf_path",
    "teacher.cache_dir",
    "teacher.fp8.certificate",
    "teacher.fp8.certificate_problems",
    "teacher.fp8.max_kl",
    "data.problems",
    "data.validation_problems",
    "data.forgetting_problems",
    "references.path",
    "references.endpoints",
    "weights.pass_rates",
    "rollout",
    "grading.num_workers",
    "loss.chunk_size",
    "evaluation",
    "training",
    "snr",
)
# Settings within `rollout` that may not change: they decide what is sampled.
FIXED = (
    "rollout.temperature",
    "rollout.top_p",
    "rollout.refit_every_n_steps",
    "rollout.max_staleness",
)

RESHARD = (
    "to go on at another layout, let the run write its next checkpoint with "
    "exp_manager.checkpoint_callback_params.fully_reshardable=true first"
)
# Settings that decide how Megatron divides the optimizer's state, beyond its division over
# data-parallel ranks.
SHARDING = (
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.virtual_pipeline_model_parallel_size",
    "model.expert_model_parallel_size",
    "model.make_vocab_size_divisible_by",
    "model.optim.overlap_grad_reduce",
)


def check_config(saved: dict[str, Any], config: PacedConfig, where: Path) -> None:
    """Refuse to go on when a setting that decides the result differs from the saved run's.

    Raises:
        CheckpointError: names every such key with both values.
    """
    changed = [change for key, change in _changes(saved, config) if not _changeable(key)]
    if changed:
        raise CheckpointError(
            f"{where} was written with another configuration: {'; '.join(changed)}. Start with "
            "the saved values, or choose another exp_manager.name for a new run"
        )


def check_shards(saved: dict[str, Any], config: PacedConfig, where: Path) -> None:
    """Refuse to read the optimizer's state, written in shards, into shards of another kind.

    Raises:
        CheckpointError: names every setting that differs, with the way to change it.
    """
    changed = [change for key, change in _changes(saved, config) if key in SHARDING]
    if changed:
        raise CheckpointError(
            f"{where} holds the optimizer's state in the shards of the layout that wrote it: "
            f"{'; '.join(changed)}. Start with the saved values; {RESHARD}"
        )


def check_data(run_dir: Path, problems: Sequence[Problem]) -> None:
    """Refuse to go on when a training problem was added, removed, changed or moved.

    The first call of a run writes the fingerprint.

    Raises:
        CheckpointError: counts the differences and names the first problems of each kind.
    """
    path = run_dir / DATA_FILE
    now = digests(problems)
    if not path.exists():
        path.write_text(json.dumps(now) + "\n")
        return
    before = json.loads(path.read_text())
    if list(before.items()) == list(now.items()):
        return
    kinds = {
        "added": [i for i in now if i not in before],
        "removed": [i for i in before if i not in now],
        "changed": [i for i in now if i in before and now[i] != before[i]],
    }
    parts = [f"{len(ids)} {kind} ({', '.join(ids[:3])})" for kind, ids in kinds.items() if ids]
    raise CheckpointError(
        f"data.problems differs from what {run_dir} was started with: "
        f"{'; '.join(parts) or 'the same problems in another order'}. Give it the same file, or "
        "choose another exp_manager.name for a new run"
    )


def _changes(saved: dict[str, Any], config: PacedConfig) -> Iterator[tuple[str, str]]:
    """Settings that differ, each with a line of both values."""
    before, now = leaves(saved), leaves(to_dict(config))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            yield key, f"{key} was {before.get(key)!r} and is {now.get(key)!r}"


def _changeable(key: str) -> bool:
    def under(names: tuple[str, ...]) -> bool:
        return any(key == n or key.startswith((f"{n}.", f"{n}[")) for n in names)

    return under(CHANGEABLE) and not under(FIXED)
