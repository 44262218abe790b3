import socket

import pytest

from nemo_paced.config import (
    ReferencesConfig,
    ReferenceSource,
    RefitBackend,
    RolloutConfig,
    RolloutPlacement,
    WeightSwap,
)
from nemo_paced.errors import ConfigError
from nemo_paced.serving.replicas import replica_devices
from nemo_paced.serving.sidecar import free_ports, listen_address


def test_each_replica_gets_gpus_of_its_own():
    config = RolloutConfig(num_replicas=3, tensor_parallel_size=2)
    assert replica_devices(config, 8, None) == ["0,1", "2,3", "4,5"]
    assert replica_devices(config, 6, "7,6,5,4,3,2") == ["7,6", "5,4", "3,2"]
    assert replica_devices(config, 0, None) == [None] * 3, "the CPU build has none"
    assert replica_devices(RolloutConfig(tensor_parallel_size=2), 8, None) == ["0,1"]
    one = RolloutConfig(num_replicas=2)
    assert replica_devices(one, 8, None, first=6) == ["6", "7"], "the trainer has the others"
    with pytest.raises(ConfigError, match="needs 6 GPUs and 4 are visible"):
        replica_devices(config, 4, None)
    with pytest.raises(ConfigError, match=r"needs 2 GPUs beside the trainer's 8 .*=colocated"):
        replica_devices(one, 8, None, first=8)


def test_an_interface_is_named_by_its_address():
    assert listen_address("lo") == "127.0.0.1"
    assert listen_address("10.1.2.3") == "10.1.2.3"


def test_free_ports_differ_and_can_be_listened_on():
    ports = free_ports("127.0.0.1", 5)
    assert len(set(ports)) == 5
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", ports[0]))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"host": "0.0.0.0"}, "rollout.host is '0.0.0.0'"),
        ({"num_replicas": 0}, "rollout.num_replicas is 0"),
        ({"num_replicas": 2, "endpoints": ["http://a:1"]}, "rollout.num_replicas is 2 and"),
        ({"endpoints": ["a:1"]}, "each must be a URL"),
        ({"placement": RolloutPlacement.colocated, "max_staleness": 1}, "cannot sample ahead"),
        (
            {"placement": RolloutPlacement.colocated, "endpoints": ["http://a:1"]},
            "do not sleep for this trainer",
        ),
        ({"placement": RolloutPlacement.colocated, "refit": RefitBackend.nccl}, "NCCL refuses"),
        ({"refit": RefitBackend.ipc}, "rollout.refit is ipc and rollout.placement separate"),
        ({"swap": WeightSwap.in_flight}, "rollout.swap is in_flight and rollout.max_staleness 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        RolloutConfig(**settings)


def test_endpoints_of_a_teacher_that_nobody_asks_are_refused():
    with pytest.raises(ConfigError, match=r"references.endpoints is set and references.source"):
        ReferencesConfig(source=ReferenceSource.solution, endpoints=["http://a:1"])
