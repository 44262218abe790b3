import logging
import math
import random
import statistics

import pytest

from nemo_paced.config import PacedConfig, RolloutConfig, StageConfig, TrainingConfig
from nemo_paced.data.packing import TrainItem
from nemo_paced.errors import PacedError
from nemo_paced.student.step import StepResult
from nemo_paced.training.batches import Batch
from nemo_paced.training.faults import Guard, waited_for
from nemo_paced.training.schedule import Stage

BATCH = Batch([TrainItem("r", "p7", (1,), (1,), (2,), 1.0)], {})
USUAL = [1.0, 1.2, 0.9] * 4


def result(loss, grad_norm=1.0, gap=math.nan):
    return StepResult(loss, grad_norm, 0.1, gap, 5, 0, 0.1, 0.1, 0.0)


def run(losses, stages=None, speaks=True, **options):
    """The guard after these steps, with what it found odd as ``odd``."""
    guard = Guard(PacedConfig(training=TrainingConfig(**options)), speaks=speaks)
    guard.odd = []
    for step, loss in enumerate(losses):
        name = stages[step] if stages else "forward_kl"
        stage = Stage(StageConfig(name=name), 0, 100)
        if problems := guard.check(step, stage, BATCH, result(loss), fresh=False):
            guard.odd.append((step, problems))
    return guard


def test_a_loss_spike_is_logged_and_its_problems_are_kept(caplog):
    with caplog.at_level(logging.WARNING):
        assert run([*USUAL, 4.9]).odd == []
        assert not caplog.records, "within the factor"
        assert run([*USUAL, 5.1]).odd == [(12, ["p7"])]
    (record,) = caplog.records
    assert record.message == "step 12: loss 5.1 is 5.1 times the median of the last 12 steps"


def test_small_batches_whose_losses_differ_by_factors_have_no_spikes():
    losses = [
        math.exp(x) for x in random.Random(0).choices([-1.5, -1, -0.5, 0, 0.5, 1, 1.8], k=300)
    ]
    assert max(losses) > 5 * statistics.median(losses)
    assert run(losses).odd == []
    assert [step for step, _ in run([*losses, 1e4]).odd] == [300]


def test_one_rank_speaks_for_all(caplog):
    with caplog.at_level(logging.INFO):
        assert run([*USUAL, 50.0, math.nan], speaks=False).odd == [(12, ["p7"]), (13, ["p7"])]
    assert not caplog.records


@pytest.mark.parametrize(
    ("losses", "stages", "options"),
    [
        ([*USUAL, 50.0], None, {"loss_spike_factor": 0.0}),
        ([1.0, 1.0, 50.0], None, {}),  # nothing to compare with yet
        ([*USUAL, 50.0], ["forward_kl"] * 12 + ["reverse_kl"], {}),  # another divergence
    ],
)
def test_what_is_no_spike(caplog, losses, stages, options):
    with caplog.at_level(logging.WARNING):
        run(losses, stages, **options)
    assert not caplog.records


def test_skipped_steps_are_counted_and_bounded(caplog):
    with caplog.at_level(logging.WARNING):
        guard = run([1.0, math.nan, 1.0, math.inf], max_skipped_steps=2)
    assert guard.skipped == 2 and caplog.text.count("update skipped (problems p7)") == 2
    with pytest.raises(PacedError, match=r"more than training.max_skipped_steps 1.* problems p7"):
        run([math.nan, math.nan], max_skipped_steps=1)


def test_a_server_that_samples_from_other_weights_stops_the_run():
    guard = Guard(PacedConfig())
    stage = Stage(StageConfig(), 0, 100)
    guard.check(0, stage, BATCH, result(1.0, gap=9.0), fresh=False)  # older weights, by setting
    with pytest.raises(PacedError, match="logprob_gap is 9"):
        guard.check(0, stage, BATCH, result(1.0, gap=9.0), fresh=True)


def lengths(truncated, mean, config=None):
    """The guard's check of steps with these shares of cut responses and mean lengths."""
    guard, stage = Guard(config or PacedConfig()), Stage(StageConfig(), 0, 100)
    for step, (share, length) in enumerate(zip(truncated, mean, strict=True)):
        metrics = {"rollout/truncated": share, "rollout/mean_length": length}
        guard.check(step, stage, Batch(BATCH.items, metrics), result(1.0), fresh=False)


@pytest.mark.parametrize(
    ("truncated", "mean", "told"),
    [
        ([0.1] * 60, [100.0] * 60, []),
        ([0.0] * 30, [100.0] * 15 + [140.0] * 15, []),
        ([0.0] * 30, [100.0] * 15 + [210.0] * 15, ["responses have 210 tokens in the mean, 100"]),
        ([0.05] * 15 + [0.2] * 15, [100.0] * 30, ["of the responses are cut, 5% were"]),
        ([0.01] * 15 + [0.05] * 15, [100.0] * 30, []),  # few
        # over more steps than the window has: no sudden change
        ([0.0] * 400, [100.0 * 2 ** (n / 200) for n in range(400)], []),
    ],
)
def test_responses_that_double_within_a_window_are_told_of_once(caplog, truncated, mean, told):
    with caplog.at_level(logging.WARNING):
        lengths(truncated, mean)
    assert len(caplog.records) == len(told)
    for record, words in zip(caplog.records, told, strict=True):
        assert words in record.message and "no stop token" in record.message


def test_too_many_cut_responses_stop_the_run():
    config = PacedConfig(rollout=RolloutConfig(max_truncated_share=0.5))
    lengths([0.9] * 4, [9.0] * 4, config)  # too few steps to say
    lengths([0.9, 0.1] * 20, [9.0] * 40, PacedConfig())
    with pytest.raises(PacedError, match=r"step 12: 52% of the last 5 .*max_truncated_share 0.5"):
        lengths([0.4] * 10 + [0.6] * 5, [9.0] * 15, config)


def test_only_the_rank_that_all_others_wait_for_is_named():
    tp_01, tp_23, dp_02, dp_13 = ("tp [0, 1]", "tp [2, 3]", "dp [0, 2]", "dp [1, 3]")
    begun = [
        {tp_01: 8, dp_02: 3},  # waits for rank 1
        {tp_01: 7, dp_13: 3},
        {tp_23: 8, dp_02: 4},  # waits for rank 0
        {tp_23: 8, dp_13: 4},  # waits for rank 1
    ]
    assert waited_for(begun) == {1: " and has not joined the others in tp [0, 1]"}
    assert waited_for([{tp_01: 8}, {tp_01: 8}]) == {}


def test_ranks_that_wait_for_each_other_are_all_named():
    assert waited_for([{"a": 2, "b": 1}, {"a": 1, "b": 2}]).keys() == {0, 1}
