"""What a rank sets for its GPU, and that a rollout server does not inherit it."""

import os

import pytest

from nemo_paced.config import RefitBackend, RolloutConfig, RolloutPlacement
from nemo_paced.parallel.gpu_environment import set_for_trainer
from nemo_paced.serving.backends import may_share_memory
from nemo_paced.serving.replicas import Replicas

NAMES = ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.fixture
def environment(monkeypatch):
    """Without these variables, and as it was after the test."""
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return lambda: {name: os.environ[name] for name in NAMES if name in os.environ}


def of_a_server(tmp_path):
    replicas = Replicas(
        tmp_path, RolloutConfig(), max_model_len=8, dtype="float32", log_path=tmp_path / "log"
    )
    (sidecar,) = replicas.sidecars.values()
    return sidecar.engine.environment(sidecar.served)


def test_the_trainer_has_them_and_its_servers_do_not(environment, tmp_path):
    set_for_trainer(shares_memory=False)
    assert environment() == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    assert not of_a_server(tmp_path).keys() & set(NAMES)


def test_what_the_user_has_set_stays_everywhere(environment, monkeypatch, tmp_path):
    own = {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "PYTORCH_CUDA_ALLOC_CONF": "backend:native"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    set_for_trainer(shares_memory=False)
    assert environment() == own
    assert own.items() <= of_a_server(tmp_path).items()


def test_memory_that_is_shared_lies_in_segments_that_do_not_grow(environment):
    set_for_trainer(shares_memory=True)
    assert "PYTORCH_ALLOC_CONF" not in environment()


@pytest.mark.parametrize(
    ("refit", "placement", "shared"),
    [
        ("auto", "colocated", True),
        ("auto", "separate", False),
        ("ipc", "colocated", True),
        ("file", "colocated", False),
    ],
)
def test_memory_may_be_shared_where_the_transport_may_be_cuda_ipc(refit, placement, shared):
    config = RolloutConfig(refit=RefitBackend(refit), placement=RolloutPlacement(placement))
    assert may_share_memory(config) is shared
