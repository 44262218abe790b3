import pytest

from nemo_paced.errors import RolloutError
from nemo_paced.records import Rollout
from nemo_paced.rollout.store import RolloutStore


def rollout(problem, sample, step=0):
    return Rollout(
        response_id=f"{problem}/{step}/{sample}",
        problem_id=problem,
        response_ids=(3, 4, 1),
        sample=sample,
        step=step,
        seed=9,
        logprobs=(-0.5, -1.25, -0.1),
        text="é x",
        correct=True,
        extracted="x",
    )


def test_what_was_appended_is_there_after_a_restart(tmp_path):
    with RolloutStore(tmp_path) as store:
        store.append("train", [rollout("a", 0), rollout("a", 1)])
        store.append("train", [rollout("a", 1), rollout("b", 0, step=3)])
    with RolloutStore(tmp_path) as store:
        assert len(store) == 3
        assert store.get("train", 3, "b", 0) == rollout("b", 0, step=3)
        assert store.get("pass_rates", 3, "b", 0) is None


def test_a_file_cut_at_any_byte_loses_only_the_cut_line(tmp_path):
    with RolloutStore(tmp_path) as store:
        for index in range(3):
            store.append("train", [rollout("a", index)])
    whole = store.path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(0, len(whole), 7):
        store.path.write_bytes(whole[:cut])
        with RolloutStore(tmp_path) as reopened:
            kept = sum(end <= cut for end in ends)
            assert len(reopened) == kept
            reopened.append("train", [rollout("a", index) for index in range(3)])
            assert len(reopened) == 3
        assert store.path.read_bytes() == whole, "the missing ones were appended, none twice"


def test_a_damaged_line_is_refused_with_its_place(tmp_path):
    with RolloutStore(tmp_path) as store:
        store.append("train", [rollout("a", 0), rollout("a", 1)])
    data = bytearray(store.path.read_bytes())
    data[20] ^= 1
    store.path.write_bytes(data)
    with pytest.raises(RolloutError, match="damaged at byte 0"):
        RolloutStore(tmp_path)


def test_a_full_disk_loses_nothing_that_was_written(tmp_path, monkeypatch):
    store = RolloutStore(tmp_path)
    store.append("train", [rollout("a", 0)])

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("nemo_paced.rollout.store.os.fsync", full)
        with pytest.raises(RolloutError, match="No space left"):
            store.append("train", [rollout("a", 1)])
    store.append("train", [rollout("a", 1)])
    store.close()
    with RolloutStore(tmp_path) as reopened:
        assert len(reopened) == 2
