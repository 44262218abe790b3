"""What a long piece of work says where no bar is drawn."""

import logging

import pytest
from rich.progress import Progress

from nemo_paced.run import progress


@pytest.fixture
def clock(monkeypatch, caplog):
    """Seconds of :func:`time.monotonic`, in a list of one."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO)
    return now


def test_a_long_task_says_once_a_minute_how_far_it_is(clock, caplog):
    with progress.bar_task(Progress(disable=True), "pass rates at step 0", 1000) as advance:
        for done in range(1, 1001):
            clock[0] += 0.25
            advance(done, 1000)
    assert caplog.messages == [
        f"pass rates at step 0: {done} of 1000, about {left} s left"
        for done, left in ((240, 190), (480, 130), (720, 70), (960, 10))
    ]


def test_what_takes_less_than_a_minute_says_nothing(clock, caplog):
    with progress.bar_task(Progress(disable=True), "evaluate base", 10) as advance:
        for done in range(10):
            clock[0] += 5
            advance(done, 10)
    assert not caplog.messages


def test_a_server_that_starts_slowly_says_so(clock, caplog):
    notes = progress.server_notes(Progress(disable=True))
    for passed in (0, 50, 100):
        clock[0] = passed
        notes(f"starting vLLM on model, {passed} s")
    notes("")
    clock[0] += 1000  # healthy meanwhile
    notes("starting vLLM on model, 1 s")
    assert caplog.messages == ["starting vLLM on model, 100 s"]
