"""Servers of somebody else are asked before the start: real sockets, the real key check."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import uvicorn

from nemo_paced.compose import with_config
from nemo_paced.config import (
    ReferencesConfig,
    RefitBackend,
    RolloutConfig,
    StageConfig,
    WeightsConfig,
)
from nemo_paced.preflight import servers
from nemo_paced.preflight.findings import Severity
from nemo_paced.preflight.inputs import Inputs
from nemo_paced.preflight.probe import probe_servers
from nemo_paced.rollout.served import training_length
from nemo_paced.serving.api_key import API_KEY_VARIABLE, ApiKeyMiddleware
from nemo_paced.serving.engine import SERVED_NAME
from nemo_paced.serving.sidecar import free_ports

KEY = "the-key-of-the-servers"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)


@pytest.fixture
def config():
    composed = []
    with_config(["--config-name", "quickstart"], composed.append)
    return composed[0]


@contextmanager
def served(*, model=SERVED_NAME, length=64, health=200, body=None):
    """A server behind our key check that says it serves ``model``; yields its endpoint."""
    models = {"data": [{"id": model, "max_model_len": length}]}

    async def app(scope, receive, send):
        status = health if scope["path"] == "/health" else 200
        payload = body or json.dumps(models).encode()
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": payload})

    (port,) = free_ports("127.0.0.1", 1)
    server = uvicorn.Server(
        uvicorn.Config(ApiKeyMiddleware(app), port=port, lifespan="off", log_level="critical")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def found(config, run_dir):
    findings = list(servers.endpoints(Inputs(config, run_dir)))
    assert all(f.severity is Severity.error and f.remedy for f in findings)
    assert not any(KEY in str(finding) for finding in findings)
    return findings


def test_every_server_that_would_not_do_is_named_with_why(config, tmp_path):
    (closed,) = free_ports("127.0.0.1", 1)
    with (
        served() as good,
        served(health=503) as dead,
        served(model="llama") as other,
        served(length=31) as short,
        served(body=b"<html>") as no_server,
    ):
        endpoints = [good, f"http://127.0.0.1:{closed}", dead, other, short, no_server]
        config.rollout = RolloutConfig(endpoints=endpoints)
        findings = found(config, tmp_path)
    assert {f.where for f in findings} == {"rollout.endpoints"}
    told = [
        "does not answer (ConnectError",
        "answers 503 to /health",
        f"serves llama, not {SERVED_NAME}",
        "takes 31 tokens of prompt and response, and up to 32",
        "is no vLLM server",
    ]
    assert len(findings) == len(told)
    for finding, endpoint, what in zip(findings, endpoints[1:], told, strict=True):
        assert finding.what.startswith(f"{endpoint} {what}")


def test_a_wrong_key_and_none_are_told_apart(config, tmp_path, monkeypatch):
    with served() as endpoint:
        config.rollout = RolloutConfig(endpoints=[endpoint])
        assert found(config, tmp_path) == []
        monkeypatch.setenv(API_KEY_VARIABLE, "of-another-run")
        (finding,) = found(config, tmp_path)
        assert finding.what == f"{endpoint} refuses the key"
        assert "of-another-run" not in str(finding)
        monkeypatch.delenv(API_KEY_VARIABLE)
        (finding,) = found(config, tmp_path)
        assert API_KEY_VARIABLE in finding.what


def test_servers_that_hang_are_all_found_within_one_timeout():
    with socket.socket() as silent:  # takes connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen(16)
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        refusals = probe_servers([endpoint] * 8, KEY, max_model_len=1, timeout_s=0.5)
        assert time.monotonic() - began < 2
    assert len(refusals) == 8 and "does not answer (ReadTimeout" in refusals[0].what


def test_only_servers_that_this_start_asks_have_to_answer(config, tmp_path):
    (closed,) = free_ports("127.0.0.1", 1)
    gone = [f"http://127.0.0.1:{closed}"]
    config.rollout = RolloutConfig(endpoints=gone)
    config.references = ReferencesConfig(endpoints=gone)
    wheres = ["rollout.endpoints", "references.endpoints"]
    assert [f.where for f in found(config, tmp_path)] == wheres
    # its references exist: the teacher is not asked any more
    (tmp_path / "references.jsonl").write_text('{"id": "a", "response": "s1", "correct": true}\n')
    assert [f.where for f in found(config, tmp_path)] == wheres[:1]
    config.references = replace(config.references, max_attempts=None)
    (tmp_path / "references.jsonl").write_text("{\n")
    assert [f.where for f in found(config, tmp_path)] == [wheres[0], "references"]
    (tmp_path / "references.jsonl").unlink()
    # stored responses and given pass rates: the student is not asked at all
    config.stages = [StageConfig()]
    config.weights = WeightsConfig(pass_rates="some.parquet")
    assert [f.where for f in found(config, tmp_path)] == wheres[1:]


def test_a_transport_that_cannot_work_is_found_by_its_own_name(config, tmp_path):
    config.rollout = RolloutConfig(refit=RefitBackend.nccl)
    (finding,) = servers.own_servers(Inputs(config, tmp_path))
    assert finding.where == "rollout.refit" and "needs a GPU" in finding.what


def test_servers_of_our_own_need_vllm_and_gpus(config, tmp_path, monkeypatch):
    config.rollout = RolloutConfig(num_replicas=3, tensor_parallel_size=2)
    inputs = Inputs(config, tmp_path)
    assert list(servers.own_servers(inputs)) == []
    monkeypatch.setattr(servers, "gpu_count", lambda: 4)
    (finding,) = servers.own_servers(inputs)
    assert finding.where == "rollout.num_replicas"
    assert "needs 6 GPUs beside the trainer's 2 and 4 are visible" in finding.what
    monkeypatch.setattr(servers.importlib.util, "find_spec", lambda name: None)
    assert [f.where for f in servers.own_servers(inputs)] == ["rollout", "rollout.num_replicas"]
    config.rollout = RolloutConfig(endpoints=["http://elsewhere:8000"])
    assert list(servers.own_servers(inputs)) == []


def test_a_server_needs_the_room_that_one_of_ours_would_be_given(config, tmp_path):
    """Long evaluations count where the run validates, up to the model's context."""
    config.evaluation.max_response_length = 30_000
    with served(length=32) as endpoint:
        config.rollout = RolloutConfig(endpoints=[endpoint])
        assert found(config, tmp_path) == []
        config.trainer.val_check_interval = 5
        (finding,) = found(config, tmp_path)
    context = training_length(config, Path(config.student.hf_path), config.data.max_prompt_length)
    assert f"takes 32 tokens of prompt and response, and up to {context}" in finding.what
