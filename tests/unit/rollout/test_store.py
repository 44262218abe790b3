import json
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import asdict, replace

import pytest

from nemo_paced.errors import RolloutError
from nemo_paced.records import Outcome, Rollout
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
        outcome=Outcome.right,
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


@pytest.fixture
def behind_a_slow_disk(tmp_path, monkeypatch):
    """Runs one thread into a sync, then others until they wait behind it; then lets all go.

    Returns the number of syncs; the first ones fail with ``errors``.
    """

    def run(store, append, *others, errors=()):
        reached, go_on, syncs, errors = threading.Event(), threading.Event(), [], list(errors)

        def fsync(descriptor):
            syncs.append(descriptor)
            reached.set()
            assert go_on.wait(20)
            if errors:
                raise errors.pop(0)

        monkeypatch.setattr("nemo_paced.rollout.store.os.fsync", fsync)
        threads = [threading.Thread(target=append, args=([rollout("first", 0)],))]
        threads[0].start()
        assert reached.wait(20)
        threads += [threading.Thread(target=append, args=(rollouts,)) for rollouts in others]
        for thread in threads[1:]:
            thread.start()
        deadline = time.monotonic() + 20
        while len(store._waiting) < 1 + len({r.response_id for each in others for r in each}):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert len(store) == 0, "none counts as stored before it is synced"
        go_on.set()
        for thread in threads:
            thread.join(20)
        monkeypatch.undo()
        assert not store._waiting
        return len(syncs)

    return run


def test_threads_that_wait_for_the_disk_share_a_sync(tmp_path, behind_a_slow_disk):
    same = [rollout("a", 0), rollout("a", 1)]
    others = [same, same, [rollout("b", 0)], [rollout("c", 0)]]
    with RolloutStore(tmp_path) as store:
        assert behind_a_slow_disk(store, lambda r: store.append("train", r), *others) == 2
        assert len(store) == 5
    with RolloutStore(tmp_path) as store:
        assert len(store) == 5 and store.get("train", 0, "a", 1) == same[1]
    assert len(store.path.read_bytes().splitlines()) == 5, "none is stored twice"


def test_a_failed_sync_costs_the_threads_behind_it_nothing(tmp_path, behind_a_slow_disk):
    told = []

    def append(rollouts):
        try:
            store.append("train", rollouts)
        except RolloutError as error:
            told.append(str(error))

    others = [[rollout(problem, 0)] for problem in "abcd"]
    with RolloutStore(tmp_path) as store:
        full = [OSError("no space left")] * 2
        assert behind_a_slow_disk(store, append, *others, errors=full) == 3
        assert len(told) == 2 and all("The 0 rollouts before are safe" in error for error in told)
        assert len(store) == 5, "the next one found room, and wrote for those that failed too"
    with RolloutStore(tmp_path) as store:
        assert len(store) == 5
    assert len(store.path.read_bytes().splitlines()) == 5, "each line whole, and once"


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
