import logging
import math

import pytest

from nemo_paced.config import PacedConfig, StageConfig, TrainingConfig
from nemo_paced.data.packing import TrainItem
from nemo_paced.errors import PacedError
from nemo_paced.training.batches import Batch
from nemo_paced.training.faults import Guard
from nemo_paced.training.schedule import Stage
from nemo_paced.training.step import StepResult

BATCH = Batch([TrainItem("r", "p7", (1,), (1,), (2,), 1.0)], {})
USUAL = [1.0, 1.2, 0.9] * 4


def result(loss, grad_norm=1.0, gap=math.nan):
    return StepResult(loss, grad_norm, 0.1, gap, 5, 0, 0.1, 0.1)


def run(losses, stages=None, **options):
    guard = Guard(PacedConfig(training=TrainingConfig(**options)))
    for step, loss in enumerate(losses):
        name = stages[step] if stages else "forward_kl"
        stage = Stage(StageConfig(name=name), 0, 100)
        guard.check(step, stage, BATCH, result(loss), fresh=False)
    return guard


def test_a_loss_spike_is_logged_with_the_problems_of_its_batch(caplog):
    with caplog.at_level(logging.WARNING):
        run([*USUAL, 4.9])
        assert not caplog.records, "within the factor"
        run([*USUAL, 5.1])
    assert "step 12: loss 5.1 is 5.1 times the median 1 of the last 12 steps (problems p7)" in (
        caplog.text
    )


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
