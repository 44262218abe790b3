"""Preflight checks of rollout servers: what own ones need, and whether running ones answer."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_paced.config import RolloutPlacement
from nemo_paced.errors import ConfigError
from nemo_paced.preflight.findings import Finding, error
from nemo_paced.preflight.inputs import Inputs
from nemo_paced.preflight.probe import probe_servers
from nemo_paced.rollout.served import training_length
from nemo_paced.run.checkpoint_files import checkpoints
from nemo_paced.serving.api_key import API_KEY_VARIABLE
from nemo_paced.serving.backends import choose_backend
from nemo_paced.serving.replicas import replica_devices
from nemo_paced.serving.sidecar import listen_address
from nemo_paced.serving.vllm_engine import gpu_count
from nemo_paced.training.references import to_be_sampled


def own_servers(inputs: Inputs) -> Iterator[Finding]:
    """Check vLLM, GPUs and ``rollout.refit`` where the run starts servers of its own."""
    rollout = inputs.config.rollout
    if rollout.endpoints or not (_student_is_asked(inputs) or _teacher_is_asked(inputs)):
        return
    if rollout.python is None and not importlib.util.find_spec("vllm"):
        yield error(
            "rollout",
            "vllm is not installed here and rollout.endpoints is empty",
            "install nemo-paced[gpu] or [cpu], set rollout.python to an interpreter that has it, "
            "or rollout.endpoints to a running server",
        )
    try:
        separate = rollout.placement is RolloutPlacement.separate
        beside = inputs.config.trainer.devices if separate else 0
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        replica_devices(rollout, gpu_count(), visible, first=beside)
    except ConfigError as refusal:
        yield error("rollout.num_replicas", str(refusal))
    try:
        choose_backend(rollout, gpu_count(), [listen_address(rollout.host)])
    except ConfigError as refusal:
        yield error("rollout.refit", str(refusal))


def endpoints(inputs: Inputs) -> Iterator[Finding]:
    """Check that running servers answer, take the key and serve long enough sequences.

    Only those that this start is going to ask are checked.
    """
    config, data = inputs.config, inputs.config.data
    if _student_is_asked(inputs):
        student = Path(config.student.hf_path)
        longest = training_length(config, student, data.max_prompt_length)
        yield from _probed("rollout.endpoints", config.rollout.endpoints, longest)
    try:
        if to_be_sampled(config, inputs.run_dir):
            longest = data.max_teacher_prompt_length + data.max_response_length
            yield from _probed("references.endpoints", config.references.endpoints, longest)
    except ConfigError as refusal:
        yield error("references", str(refusal), "mend the file, or remove it to make it anew")


def _student_is_asked(inputs: Inputs) -> bool:
    return inputs.config.asks_student(resumed=bool(checkpoints(inputs.run_dir)))


def _teacher_is_asked(inputs: Inputs) -> bool:
    try:
        return to_be_sampled(inputs.config, inputs.run_dir)
    except ConfigError:
        return False  # `endpoints` tells of it


def _probed(where: str, servers: Sequence[str], longest: int) -> Iterator[Finding]:
    if not servers:
        return
    key = os.environ.get(API_KEY_VARIABLE, "")
    if not key:
        yield error(
            where,
            f"is set and the environment variable {API_KEY_VARIABLE} is not",
            "export the key that the servers were started with",
        )
        return
    for refusal in probe_servers(servers, key, max_model_len=longest):
        yield error(where, f"{refusal.endpoint} {refusal.what}", refusal.remedy)
