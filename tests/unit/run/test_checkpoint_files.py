import json
import logging
from dataclasses import asdict

import pytest

from nemo_paced.config import CheckpointCallbackParams
from nemo_paced.run import checkpoint_files
from nemo_paced.run.checkpoint_files import RunState, checkpoint_dir, checkpoints


def write(run_dir, step, accuracy=None):
    directory = checkpoint_dir(run_dir, step)
    directory.mkdir(parents=True)
    (directory / "weights.distcp").write_bytes(b"x" * 100)
    (directory / "hf").mkdir()
    (directory / "hf" / "config.json").write_text("{}")
    state = RunState(step, 8 * step, 0, {}, (1, 1), accuracy)
    (directory / "paced.json").write_text(json.dumps(asdict(state)))
    checkpoint_files.record_sizes(directory)
    return directory


def cut(directory):
    (directory / "weights.distcp").write_bytes(b"x" * 40)


def lose(directory):
    (directory / "hf" / "config.json").unlink()


def empty_state(directory):
    (directory / "paced.json").write_text("")


def no_sizes(directory):
    (directory / "files.json").unlink()


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (cut, "weights.distcp has 40 of 100 bytes"),
        (lose, "hf/config.json is missing"),
        (empty_state, "paced.json cannot be read"),
        (no_sizes, "files.json"),
    ],
)
def test_a_broken_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, break_it, told):
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    assert checkpoint_files.newest_whole(tmp_path) == second
    break_it(second)
    with caplog.at_level(logging.WARNING):
        assert checkpoint_files.newest_whole(tmp_path) == first
    assert told in caplog.text and "step_00000002" in caplog.text
    break_it(first)
    assert checkpoint_files.newest_whole(tmp_path) is None


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (CheckpointCallbackParams(save_top_k=2), [5, 6]),
        (CheckpointCallbackParams(save_top_k=-1), [1, 2, 3, 4, 5, 6]),
        (CheckpointCallbackParams(save_top_k=1, save_best_k=2), [2, 4, 6]),
        (CheckpointCallbackParams(save_top_k=3, save_best_k=1), [4, 5, 6]),
        (CheckpointCallbackParams(save_top_k=1, save_best_k=9), [1, 2, 4, 5, 6]),
    ],
)
def test_the_newest_and_the_best_stay(tmp_path, keep, left):
    for step, accuracy in enumerate((0.1, 0.5, None, 0.7, 0.4, None), 1):
        write(tmp_path, step, accuracy)
    checkpoint_files.prune(tmp_path, keep)
    assert [checkpoint_files.read_state(path).step for path in checkpoints(tmp_path)] == left


def test_what_a_kill_left_behind_is_named(tmp_path, caplog):
    whole = write(tmp_path, 1)
    (tmp_path / "checkpoints" / ".step_00000002.tmp").mkdir()
    (tmp_path / "checkpoints" / "step_00000003").mkdir()
    with caplog.at_level(logging.WARNING):
        assert checkpoint_files.newest_whole(tmp_path) == whole
    assert ".step_00000002.tmp is no whole" in caplog.text
    assert "step_00000003 is no whole" in caplog.text
