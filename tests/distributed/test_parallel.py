import time

import pytest
import torch

from nemo_paced.config import ModelConfig
from nemo_paced.errors import ConfigError
from nemo_paced.parallel import groups
from tests.distributed.harness import run_ranks


def _alone_in_a_collective(rank, world_size):
    model = ModelConfig(tensor_model_parallel_size=2)
    parallel = groups.initialize(model, accelerator="cpu", timeout_s=2)
    begin = time.monotonic()
    if rank == 1:
        parallel.messages.wait("done", 30)
        return 0.0
    with pytest.raises(RuntimeError):
        torch.distributed.all_reduce(torch.ones(1), group=parallel.tp_group)
    parallel.messages.publish("done", True)
    return time.monotonic() - begin


def test_a_rank_that_never_comes_is_given_up_after_the_time_limit():
    waited = run_ranks(2, _alone_in_a_collective)[0]
    assert 1 < waited < 20


def _cpu_beside_a_gpu(rank, world_size):
    torch.cuda.is_available = lambda: True
    parallel = groups.initialize(ModelConfig(), accelerator="cpu", timeout_s=60)
    torch.ones(1, device=parallel.device)
    return parallel.device.type, torch.cuda.is_available()


def test_the_cpu_can_be_chosen_where_there_is_a_gpu():
    """As the conversion commands do: they need no GPU on the machine that has one either."""
    assert run_ranks(1, _cpu_beside_a_gpu) == [("cpu", False)]


def _tell(rank, world_size):
    messages = groups.initialize(ModelConfig(), accelerator="cpu", timeout_s=60).messages
    if rank == 0:
        messages.publish("news", {"ids": list(range(1000))})
    value = messages.wait("news", 30)
    with pytest.raises(torch.distributed.DistStoreError):
        messages.wait("no such news", 0.1)
    return value


def test_what_one_rank_publishes_every_rank_reads():
    assert run_ranks(2, _tell) == [{"ids": list(range(1000))}] * 2


def _places(rank, world_size):
    model = ModelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    p = groups.initialize(model, accelerator="cpu", timeout_s=60)
    return (p.tp_rank, p.pp_rank, p.dp_rank, p.is_first_stage, p.is_last_stage)


def test_neighbours_share_tensors_and_stages_are_far_apart():
    assert run_ranks(4, _places) == [
        (0, 0, 0, True, False),
        (1, 0, 0, True, False),
        (0, 1, 0, False, True),
        (1, 1, 0, False, True),
    ]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor_model_parallel_size": 2}, "1 ranks were started, .* is 2"),
        ({"context_parallel_size": 2}, "context_parallel_size is 2|1 ranks were started"),
        ({"expert_model_parallel_size": 2}, "model.expert_model_parallel_size x .* is 2, which"),
    ],
)
def test_ranks_that_do_not_fit_the_layout_are_refused(sizes, message):
    run_ranks(1, _refused, sizes, message)


def _refused(rank, world_size, sizes, message):
    with pytest.raises(ConfigError, match=message):
        groups.initialize(ModelConfig(**sizes), accelerator="cpu", timeout_s=60)


def _no_gpu(rank, world_size):
    with pytest.raises(ConfigError, match=r"trainer.accelerator is gpu and torch sees no GPU"):
        groups.initialize(ModelConfig(), accelerator="gpu", timeout_s=60)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    run_ranks(1, _no_gpu)
