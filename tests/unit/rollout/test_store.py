import json
import subprocess
import sys
import threading
import zlib
from dataclasses import asdict, replace

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
        weight_versions=(("3", 2), ("4", 1)),
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


def test_a_line_of_an_earlier_release_is_read(tmp_path):
    fields = {**asdict(rollout("a", 0)), "purpose": "train"}
    del fields["weight_versions"]
    body = json.dumps(fields).encode()
    (tmp_path / "rollouts.log").write_bytes(b"%08x %s\n" % (zlib.crc32(body), body))
    with RolloutStore(tmp_path) as store:
        assert store.get("train", 0, "a", 0) == replace(rollout("a", 0), weight_versions=())


def test_a_file_cut_at_any_byte_loses_only_the_cut_line(tmp_path):
    with RolloutStore(tmp_path) as store:
        for index in range(3):
            store.append("train", [rollout("a", index)])
    whole = store.path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
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


FILLS_THE_DISK = """
import resource, sys
from nemo_paced.errors import RolloutError
from nemo_paced.rollout.store import RolloutStore
from tests.unit.rollout.test_store import rollout

limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
store = RolloutStore(sys.argv[1])
for index in range(1000):
    try:
        store.append("train", [rollout("a", 2 * index), rollout("a", 2 * index + 1)])
    except RolloutError as error:
        print(index, error)
        sys.exit(7)
"""


@pytest.mark.parametrize("limit", [2000, 2100, 2200, 2300])
def test_a_full_disk_stops_the_run_and_loses_nothing_that_was_written(tmp_path, limit):
    """The limit on a file's size stands for the disk: the kernel takes a part of a line."""
    done = subprocess.run(
        [sys.executable, "-c", FILLS_THE_DISK, tmp_path, str(limit)], capture_output=True, text=True
    )
    assert done.returncode == 7, done.stderr
    count, message = done.stdout.split(maxsplit=1)
    assert "cannot be written" in message and "free space" in message
    with RolloutStore(tmp_path) as store:
        assert len(store) == 2 * int(count) > 0
        assert store.path.stat().st_size <= limit
        store.append("train", [rollout("a", 2 * int(count))])
        assert store.get("train", 0, "a", 2 * int(count)) is not None


def test_a_second_writer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_paced.rollout.store.HOLD_S", 0.2)
    with RolloutStore(tmp_path), pytest.raises(RolloutError, match="by another process"):
        RolloutStore(tmp_path)
    RolloutStore(tmp_path).close()


def test_threads_append_whole_lines(tmp_path):
    with RolloutStore(tmp_path) as store:
        threads = [
            threading.Thread(
                target=lambda n=n: [store.append("train", [rollout(n, i)]) for i in range(20)]
            )
            for n in "abcd"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(store.get("train", 0, n, i) == rollout(n, i) for n in "abcd" for i in range(20))
    with RolloutStore(tmp_path) as store:
        assert len(store) == 80 and store.known_length("a") == 3
        assert store.known_length("z") is None
