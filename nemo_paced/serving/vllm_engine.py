"""vLLM as the inference engine of ``engine.py``: command line, environment, routes, their JSON.

Two routes sample. ``/inference/v1/generate`` is vLLM's own for token ids: it alone tells which
weights sampled each token, takes the sampling parameters as they are (no defaults of the server's
generation config) and costs the server less. ``/v1/completions`` is there for servers without it.
Sleeping, pausing and new weights are routes of vLLM's development mode.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import sys
from collections.abc import Mapping
from typing import Any

from nemo_paced.config import RefitBackend
from nemo_paced.parallel.gpu_environment import without_trainers
from nemo_paced.serving.api_key import API_KEY_VARIABLE
from nemo_paced.serving.completions import Completion, Route, SampleRequest
from nemo_paced.serving.engine import SERVED_NAME, Call, ModelCard, Served
from nemo_paced.serving.vllm_platform import FORK_VARIABLE

SERVER_MODULE = "vllm.entrypoints.openai.api_server"
# vLLM would take the trainer's rank variables for its own
_RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_RANK_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_")


def _sampling(request: SampleRequest) -> dict[str, Any]:
    return {
        "n": request.n,
        "seed": request.seed,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "max_tokens": request.max_tokens,
        "stop_token_ids": list(request.stop_token_ids),
        "logprobs": 0,  # no alternatives: the sampled token's alone
        "detokenize": False,
    }


def _generate_body(request: SampleRequest) -> dict[str, Any]:
    return {
        "model": SERVED_NAME,
        "token_ids": list(request.prompt_ids),
        "sampling_params": _sampling(request),
    }


def _completions_body(request: SampleRequest) -> dict[str, Any]:
    return {
        "model": SERVED_NAME,
        "prompt": list(request.prompt_ids),
        **_sampling(request),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,  # a server without a tokenizer has no other names
    }


def _generated(choice: dict[str, Any]) -> Completion:
    return Completion(
        tuple(int(token) for token in choice["token_ids"]),
        tuple(float(entry["logprob"]) for entry in choice["logprobs"]["content"]),
        choice["finish_reason"],
        tuple(
            (str(span["version"]), int(span["end"]) - int(span["start"]))
            for span in choice.get("weight_versions") or ()
        ),
    )


def _completed(choice: dict[str, Any]) -> Completion:
    return Completion(
        tuple(int(token) for token in choice["token_ids"]),
        tuple(float(value) for value in choice["logprobs"]["token_logprobs"]),
        choice["finish_reason"],
    )


GENERATE = Route("/inference/v1/generate", _generate_body, _generated)
COMPLETIONS = Route("/v1/completions", _completions_body, _completed)


class VllmControl:
    """vLLM's control routes; see :class:`~nemo_paced.serving.engine.Control`."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def check_health(self) -> None:
        self._call("GET", "/health")

    def models(self) -> list[list[ModelCard]]:
        return [
            [ModelCard(c["id"], c.get("root"), c.get("max_model_len")) for c in answer["data"]]
            for answer in self._call("GET", "/v1/models")
        ]

    def weight_versions(self) -> list[str | None]:
        return [answer.get("weight_version") for answer in self._call("GET", "/weight_info")]

    def num_workers(self) -> list[int]:
        return [int(answer["world_size"]) for answer in self._call("GET", "/get_world_size")]

    def checksums(self) -> list[dict[str, Any]]:
        answers = self._call("POST", "/weight_checker", json={"action": "checksum"})
        return [answer["checksums"] for answer in answers]

    def pause(self, *, finish_requests: bool) -> None:
        mode = "wait" if finish_requests else "keep"
        self._call("POST", "/pause", params={"mode": mode, "clear_cache": "true"})

    def resume(self) -> None:
        # cached keys and values are of the old weights; requests that are held compute theirs anew
        self._call("POST", "/reset_prefix_cache", params={"reset_running_requests": "true"})
        self._call("POST", "/resume")

    def sleep(self) -> None:
        self._call("POST", "/sleep", params={"level": 1, "mode": "wait"})

    def wake(self) -> None:
        self._call("POST", "/wake_up")

    def join_group(self, init_info: dict[str, Any]) -> None:
        self._call("POST", "/init_weight_transfer_engine", json={"init_info": init_info})

    def leave_group(self) -> None:
        self._call("POST", "/shutdown_weight_transfer_engine")

    def begin_update(self) -> None:
        self._call("POST", "/start_weight_update")

    def load(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        safe: Any
        if isinstance(update_info, dict):
            safe = _json_safe(update_info)
        else:
            safe = [_json_safe(part) for part in update_info]
        self._call("POST", "/update_weights", json={"update_info": safe})

    def end_update(self, version: str) -> None:
        self._call("POST", "/finish_weight_update", json={"weight_version": version})


def _json_safe(update_info: dict[str, Any]) -> dict[str, Any]:
    """The update as JSON can carry it: CUDA IPC handles, tuples of bytes, are pickled.

    The server unpickles them, on a route that requires our key.
    """
    if "ipc_handles" not in update_info:
        return update_info
    rest = {name: value for name, value in update_info.items() if name != "ipc_handles"}
    rest.pop("ipc_handles_pickled", None)
    pickled = base64.b64encode(pickle.dumps(update_info["ipc_handles"])).decode()
    return {**rest, "ipc_handles_pickled": pickled}


class Vllm:
    """vLLM's OpenAI-compatible server; see :class:`~nemo_paced.serving.engine.Engine`."""

    routes: tuple[Route, ...] = (GENERATE, COMPLETIONS)
    # unknown, switched off (without --enable-scale-out), of another method, not for this model
    no_such_route: tuple[int, ...] = (404, 403, 405, 501)
    too_many_samples = b"sampling_params.n must be at most"

    def command(self, served: Served) -> list[str]:
        arguments = {
            "--model": str(served.model_dir),
            "--served-model-name": SERVED_NAME,
            "--host": served.host,
            "--port": str(served.port),
            "--dtype": served.dtype,
            "--max-model-len": str(served.max_model_len),
            "--max-num-seqs": str(served.config.max_num_seqs),
            "--tensor-parallel-size": str(served.config.tensor_parallel_size),
            # the model's generation_config.json must not change how we sample
            "--generation-config": "vllm",
            "--middleware": "nemo_paced.serving.api_key.ApiKeyMiddleware",
            "--weight-transfer-config": json.dumps({"backend": served.refit.value}),
        }
        python = served.config.python or sys.executable
        command = [python, "-m", SERVER_MODULE]
        for name, value in arguments.items():
            command += [name, value]
        # token ids travel: the server needs no tokenizer
        command += ["--skip-tokenizer-init", "--disable-uvicorn-access-log"]
        command += ["--enable-scale-out"]  # /inference/v1/generate
        if served.sleeps:
            command.append("--enable-sleep-mode")
        if gpu_count():
            return [*command, "--gpu-memory-utilization", str(served.config.gpu_memory_utilization)]
        # On CPU vLLM 0.32 dies on a seeded request whose prefill is cut in two ("CPU Generator does
        # not use offset"), so prompts are prefilled whole.
        batched_tokens = max(served.max_model_len, 4096)
        return [
            *command,
            "--enforce-eager",
            "--no-enable-chunked-prefill",
            "--max-num-batched-tokens",
            str(batched_tokens),
        ]

    def environment(self, served: Served) -> dict[str, str]:
        special = {} if served.devices is None else {"CUDA_VISIBLE_DEVICES": served.devices}
        # handles of CUDA IPC travel pickled, on a route that our key guards
        if served.refit is RefitBackend.ipc:
            special["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        if not gpu_count():
            special[FORK_VARIABLE] = "1"
            # all cores but one, which vLLM too reserves for HTTP
            threads = str(max(1, len(os.sched_getaffinity(0)) - 1))
            special["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", threads)
        return {
            **_without_ranks(without_trainers(os.environ)),
            **special,
            API_KEY_VARIABLE: served.api_key,
            "VLLM_SERVER_DEV_MODE": "1",  # opens the weight routes, which our key guards
            "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(served.config.kv_cache_gib))),
            "VLLM_PLUGINS": "nemo_paced",  # those of other packages can take seconds to load
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def control(self, call: Call) -> VllmControl:
        return VllmControl(call)


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def _without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name not in _RANK_VARIABLES and not name.startswith(_RANK_PREFIXES)
    }


VLLM = Vllm()
