"""A rank that computes NaN, hangs or dies: noticed on all ranks, and named."""

import contextlib
import logging
import os
import signal
import subprocess
import time

import psutil
import pytest
import torch
from megatron.core import dist_checkpointing

from nemo_paced.config import ModelConfig
from nemo_paced.errors import PacedError
from nemo_paced.hf.export_weights import iter_hf_tensors
from nemo_paced.parallel import groups
from nemo_paced.training.faults import Watch
from nemo_paced.training.setup import build_models
from tests.distributed.harness import run_ranks
from tests.distributed.test_training import LAYOUTS, LR, STAGES, make_config, make_items, models

assert models  # the fixture


def _train_with_nan(rank, world_size, folder, layout, kind):
    config = make_config(folder, layout)
    parallel = groups.initialize(config.model, accelerator="cpu", timeout_s=60)
    built = build_models(config, parallel)
    if kind == "gradient":  # finite loss, one bad number on one rank

        def spoil(gradient):
            return torch.full_like(gradient, float("inf")) if rank == world_size - 1 else gradient

        parameter = built.student.chunks[0].decoder.layers[0].mlp.linear_fc1.weight
        handle = parameter.register_hook(spoil)
    elif rank == world_size - 1:
        weight = built.student.chunks[0].decoder.final_layernorm.weight
        kept = weight.detach().clone()
        weight.data.fill_(float("nan"))
    before = {
        n: t.clone() for n, t in iter_hf_tensors(built.student.chunks, parallel) if t is not None
    }
    bad = built.step(make_items(0), STAGES["forward_kl"], LR)
    after = {
        n: t.clone() for n, t in iter_hf_tensors(built.student.chunks, parallel) if t is not None
    }
    same = all(torch.equal(before[n], after[n]) for n in before if "norm.weight" not in n)
    if kind == "gradient":
        handle.remove()
    elif rank == world_size - 1:
        weight.data.copy_(kept)
    good = built.step(make_items(0), STAGES["forward_kl"], LR)
    return bad.finite, same, good.finite, good.loss


@pytest.mark.parametrize("kind", ["gradient", "weight"])
@pytest.mark.parametrize("layout", ["tp2", "dp2", "pp2 dp2"])
def test_nan_on_one_rank_skips_the_step_on_all_and_the_next_one_is_sound(models, layout, kind):
    options = (str(models), LAYOUTS[layout], kind)
    for finite, same, next_finite, loss in run_ranks(LAYOUTS[layout][2], _train_with_nan, *options):
        assert not finite and same and next_finite
        assert loss == pytest.approx(5.217, rel=0.5), "of weights that were not touched"


def _hang(rank, world_size):
    parallel = groups.initialize(ModelConfig(), accelerator="cpu", timeout_s=4)
    watch = Watch(parallel, 4)
    try:
        with watch:
            for step in range(3):
                watch.reached(step, "training")
                if rank == 1 and step == 1:
                    time.sleep(7)
                watch.reached(step, "batch")
                torch.distributed.all_reduce(torch.ones(1))
    except PacedError as error:
        return str(error)
    return ""


def test_a_rank_that_hangs_is_named_by_those_that_wait():
    told = run_ranks(3, _hang)
    for rank in (0, 2):
        assert told[rank].startswith(f"rank {rank}: a collective failed")
    assert any("rank 1 (" in each and "is at step 1, training" in each for each in told)


def _hang_in_a_step(rank, world_size, stopped):
    """TP 2 x DP 2: rank 0 waits for rank 1, and ranks 2 and 3 for both of them."""
    layout = ModelConfig(tensor_model_parallel_size=2)
    parallel = groups.initialize(layout, accelerator="cpu", timeout_s=8)
    watch, told = Watch(parallel, 8), []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("nemo_paced.training.faults").addHandler(handler)
    if rank == 1 and stopped:
        watch.reached(0, "start")
        watch._tell()  # once: its thread is stopped too
    else:
        watch.__enter__()
    for step in range(2):
        watch.reached(step, "training")
        if rank == 1 and step == 1:
            time.sleep(7)  # in time for the others
        for group in (parallel.groups.tp, parallel.groups.dp):
            torch.distributed.all_reduce(torch.ones(1), group=group)
    watch._ended.set()
    return told


@pytest.mark.parametrize("stopped", [False, True])
def test_a_rank_that_hangs_within_a_phase_is_named_before_collectives_time_out(stopped):
    told = run_ranks(4, _hang_in_a_step, stopped)[0]
    (line,) = (each for each in told if "behind the others" in each)
    assert line.startswith("behind the others: rank 1 (") and "is at step 1, training" in line
    assert (
        "does not answer" if stopped else "not joined the others in its tp group [0, 1]"
    ) in line
    assert "rank 0 (" not in line and "rank 3 (" not in line


def _die(rank, world_size):
    parallel = groups.initialize(ModelConfig(), accelerator="cpu", timeout_s=30)
    if rank == 1:
        return None  # its process ends, and with it its connections
    begin = time.monotonic()
    with pytest.raises(PacedError) as caught, Watch(parallel, 30):
        for _ in range(3):
            torch.distributed.all_reduce(torch.ones(1))
    return str(caught.value), time.monotonic() - begin


def test_a_rank_that_ends_does_not_keep_the_others_waiting():
    (told, waited_s), _ = run_ranks(2, _die)
    assert "a collective failed" in told and "peer" in told
    assert waited_s < 15


def _die_after_a_checkpoint(rank, world_size, folder):
    parallel = groups.initialize(ModelConfig(), accelerator="cpu", timeout_s=30)
    part = dist_checkpointing.ShardedTensor.from_rank_offsets(
        "part", torch.ones(2), (0, rank, world_size)
    )
    dist_checkpointing.save({"part": part}, str(folder))
    if rank == 1:
        (keeper,) = psutil.Process().children()  # of what the checkpoint's writers reported
        (folder / "keeper").write_text(str(keeper.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(PacedError), Watch(parallel, 30):
        for _ in range(3):
            torch.distributed.all_reduce(torch.ones(1))
    (folder / "waited").write_text(str(time.monotonic() - begin))


def test_what_wrote_the_checkpoint_of_a_killed_rank_neither_hides_its_death_nor_outlives_it(
    tmp_path,
):
    with pytest.raises(AssertionError, match="-9"):
        run_ranks(2, _die_after_a_checkpoint, tmp_path, grace_s=20)
    assert float((tmp_path / "waited").read_text()) < 15
    keeper = int((tmp_path / "keeper").read_text())
    with contextlib.suppress(psutil.NoSuchProcess):  # a container's init may not reap it
        assert psutil.Process(keeper).status() == psutil.STATUS_ZOMBIE


def _end_a_helper_after_a_checkpoint(rank, world_size, folder):
    groups.initialize(ModelConfig(), accelerator="cpu", timeout_s=30)
    helper = subprocess.Popen(["cat"], stdin=subprocess.PIPE)  # ends when nobody can write to it
    part = dist_checkpointing.ShardedTensor.from_rank_offsets(
        "part", torch.ones(2), (0, rank, world_size)
    )
    dist_checkpointing.save({"part": part}, str(folder))
    helper.stdin.close()
    return helper.wait(timeout=10)


def test_what_a_rank_starts_ends_with_its_pipe_after_a_checkpoint_too(tmp_path):
    assert run_ranks(1, _end_a_helper_after_a_checkpoint, tmp_path) == [0]
