import json
import logging
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from nemo_paced.compose import ASSETS
from nemo_paced.config import DataConfig, GradingConfig, PrivilegedContext
from nemo_paced.data.prompts import Prompts
from nemo_paced.errors import RolloutError
from nemo_paced.grading.grader import Grader
from nemo_paced.records import Outcome, Problem, Rollout
from nemo_paced.rollout.sampling import (
    Missing,
    SamplingSettings,
    in_requests,
    long_tail_first,
    sample_rollouts,
)
from nemo_paced.rollout.store import RolloutStore, StoredRollouts
from nemo_paced.serving.client import RolloutClient
from tests.unit.serving.wrong_server import GENERATE, Server, choice, good

PROBLEMS = [Problem(f"p{i}", "s1 f1", "s1") for i in range(30)]


def sample(
    folder,
    endpoint,
    problems=PROBLEMS,
    num_samples=4,
    limit=128,
    progress=None,
    template="{problem}",
    max_tokens=16,
    grading=None,
):
    data = DataConfig(
        prompt_template=template,
        use_chat_template=False,
        max_prompt_length=16,
        max_response_length=16,
    )
    prompts = Prompts(ASSETS / "student", data, PrivilegedContext.none)
    grading = grading or GradingConfig(verifier="exact")
    with RolloutStore(folder) as store, Grader(grading) as grader:
        found = sample_rollouts(
            problems,
            prompts=prompts,
            client=RolloutClient([endpoint], "key", max_in_flight=4),
            store=store,
            step=0,
            purpose="pass_rates",
            settings=SamplingSettings(num_samples, 1.0, 1.0, max_tokens),
            samples_per_request=limit,
            run_seed=1,
            grader=grader,
            progress=progress,
        )
        assert found[-1] == found[len(found) - 1] and found[:2] == list(found)[:2]
        return list(found)  # they lie in the store


PROGRAM = """
import sys
from tests.unit.rollout.test_sampling import sample
sample(sys.argv[1], sys.argv[2])
"""


def stored(folder):
    path = folder / "rollouts.log"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [json.loads(line.partition(b" ")[2]) for line in lines]


def test_a_killed_client_loses_only_what_was_in_flight_and_counts_nothing_twice(tmp_path):
    server = Server(good, delay=0.2)
    try:
        for kill_after in (1, 20, 60):
            process = subprocess.Popen([sys.executable, "-c", PROGRAM, tmp_path, server.endpoint])
            deadline = time.monotonic() + 300
            path = tmp_path / "rollouts.log"
            while not path.exists() or path.read_bytes().count(b"\n") < kill_after:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.005)
            process.kill()
            process.wait()
        before, asked = path.read_bytes().count(b"\n"), len(server.bodies)
        rollouts = sample(tmp_path, server.endpoint)
        assert len(server.bodies) - asked == len(PROBLEMS) - before // 4, "only what was missing"
    finally:
        server.stop()
    keys = [(r.problem_id, r.sample) for r in rollouts]
    assert keys == [(p.id, k) for p in PROBLEMS for k in range(4)]
    found = [(row["problem_id"], row["sample"]) for row in stored(tmp_path)]
    assert sorted(found) == sorted(keys), "each once"
    # at each kill four were in flight, and on a busy machine as many answers were being stored
    assert len(server.bodies) <= len(PROBLEMS) + 3 * 8
    assert len({(body["seed"]) for body in server.bodies}) == len(PROBLEMS)


@pytest.mark.parametrize(
    "changed",
    [
        {"template": "solve {problem}"},
        {"max_tokens": 12},
        {"problems": [replace(p, problem=f"{p.problem} s1") for p in PROBLEMS[:3]]},
    ],
)
def test_rollouts_that_were_asked_for_otherwise_are_sampled_again(tmp_path, changed):
    server, asked = Server(good), []
    try:
        for others in ({}, {}, changed, changed, {}):
            sample(tmp_path, server.endpoint, **{"problems": PROBLEMS[:3], **others})
            asked.append(len(server.bodies))
    finally:
        server.stop()
    assert asked == [3, 3, 6, 6, 9], "the latest is what the store holds"
    with RolloutStore(tmp_path) as store:
        assert len(store) == 12


def always_s5(body):
    return {"choices": [choice(i, (12, 1)) for i in range(body["n"])]}


@pytest.mark.parametrize(
    ("changed", "outcome"),
    [
        ({"problems": [replace(p, answer="s5") for p in PROBLEMS[:3]]}, Outcome.right),
        ({"problems": [replace(p, accepted=("s5",)) for p in PROBLEMS[:3]]}, Outcome.right),
        ({"grading": GradingConfig(verifier="multiple_choice")}, Outcome.unanswered),
        ({"grading": GradingConfig(verifier="tests.unit.grading.verifiers:judge")}, Outcome.wrong),
    ],
)
def test_what_was_graded_otherwise_is_graded_again_and_nothing_is_sampled(
    tmp_path, changed, outcome, caplog
):
    """A response costs seconds of a GPU, a verdict a millisecond."""
    server = Server(always_s5)
    try:
        first = sample(tmp_path, server.endpoint, PROBLEMS[:3])
        assert {rollout.outcome for rollout in first} == {Outcome.wrong}
        asked = len(server.bodies)
        with caplog.at_level(logging.INFO):
            changed_ones = sample(
                tmp_path, server.endpoint, **{"problems": PROBLEMS[:3], **changed}
            )
        assert {rollout.outcome for rollout in changed_ones} == {outcome}
        assert sample(tmp_path, server.endpoint, PROBLEMS[:3]) == first, "and back"
        assert len(server.bodies) == asked
    finally:
        server.stop()
    number = 0 if outcome is Outcome.wrong else 12
    assert f"graded again: {number} of 12 verdicts are others" in caplog.text
    assert [rollout.response_ids for rollout in changed_ones] == [r.response_ids for r in first]
    assert len(stored(tmp_path)) == 36, "the file keeps all, and the latest counts"


def test_rollouts_of_an_earlier_store_are_graded_again_and_count(tmp_path):
    server = Server(good)
    try:
        whole = sample(tmp_path / "new", server.endpoint, PROBLEMS[:3])
        with RolloutStore(tmp_path / "old") as store:
            earlier = [replace(r, asked="", graded="", outcome=None) for r in whole]
            store.append("pass_rates", earlier)
        server.bodies.clear()
        again = sample(tmp_path / "old", server.endpoint, PROBLEMS[:3])
        assert [replace(rollout, asked=whole[0].asked) for rollout in again] == whole
    finally:
        server.stop()
    assert not server.bodies


def test_more_samples_of_a_problem_ask_for_the_difference_only(tmp_path):
    server = Server(good)
    try:
        sample(tmp_path, server.endpoint, PROBLEMS[:3], num_samples=2)
        sample(tmp_path, server.endpoint, PROBLEMS[:3], num_samples=5)
    finally:
        server.stop()
    assert [body["n"] for body in server.bodies] == [2] * 3 + [3] * 3
    assert len({body["seed"] for body in server.bodies}) == 6, "other seeds than the first ones"


@pytest.mark.parametrize("kept", [(), range(3), (3, 4, 5), (0, 1, 2, 6), (0, 3, 4, 5, 6)])
def test_what_is_missing_is_asked_in_the_requests_of_the_whole(tmp_path, kept):
    """As a run that was killed leaves it: requests end in any order, the last of them cut."""
    server, done = Server(good), []
    try:
        whole = sample(
            tmp_path / "whole", server.endpoint, PROBLEMS[:2], 7, 3, lambda *of: done.append(of)
        )
        asked = {(b["n"], b["seed"]) for b in server.bodies}
        assert sorted(n for n, _ in asked) == [1, 1, 3, 3, 3, 3]
        assert done == [(1, 2), (2, 2)], "problems, not requests"
        with RolloutStore(tmp_path / "killed") as store:
            store.append("pass_rates", [r for r in whole if r.sample in kept])
        server.bodies.clear()
        again = sample(tmp_path / "killed", server.endpoint, PROBLEMS[:2], 7, 3)
    finally:
        server.stop()
    assert [(r.problem_id, r.sample, r.seed) for r in again if r.sample not in (1, 2)] == [
        (r.problem_id, r.sample, r.seed) for r in whole if r.sample not in (1, 2)
    ]
    assert sum(b["n"] for b in server.bodies) == 2 * (7 - len(kept))
    if 0 not in kept or {1, 2} <= set(kept):
        assert {(b["n"], b["seed"]) for b in server.bodies} <= asked


def test_a_stored_rollout_tells_which_weights_sampled_its_tokens(tmp_path):
    versions = [{"version": "3", "start": 0, "end": 2}]
    server = Server({"choices": [choice(0, versions=versions)]}, route=GENERATE)
    try:
        (rollout,) = sample(tmp_path, server.endpoint, PROBLEMS[:1], num_samples=1)
    finally:
        server.stop()
    assert rollout.weight_versions == (("3", 2),)
    assert stored(tmp_path)[0]["weight_versions"] == [["3", 2]]


@pytest.mark.parametrize("seed", range(3))
def test_unknown_lengths_are_sent_first_and_then_the_longest(tmp_path, seed):
    missing = [Missing(f"p{i}", [0]) for i in range(6)]
    with RolloutStore(tmp_path) as store:
        for name, length in (("p1", 3), ("p3", 9), ("p4", 5)):
            store.append("pass_rates", [Rollout(name, name, (1,) * length)])
        order = [each.problem_id for each in long_tail_first(missing, store, seed)]
    assert sorted(order[:3]) == ["p0", "p2", "p5"] and order[3:] == ["p3", "p4", "p1"]


def test_a_server_that_decodes_more_at_once_than_before_is_asked_for_what_is_missing(tmp_path):
    """Whatever another max_num_seqs left in the store, a request's samples are consecutive."""
    assert in_requests([0, 1, 4, 5, 6, 9], 8) == [[0, 1], [4, 5, 6], [9]]
    server = Server(good)
    try:
        with RolloutStore(tmp_path / "whole") as store:
            whole = sample(tmp_path / "other", server.endpoint, PROBLEMS[:1], 8, 2)
            store.append("pass_rates", [whole[2], whole[3], whole[6]])
        found = sample(tmp_path / "whole", server.endpoint, PROBLEMS[:1], 8, 8)
        assert [rollout.sample for rollout in found] == list(range(8))
    finally:
        server.stop()


def test_prompts_are_made_when_they_are_asked(tmp_path, monkeypatch):
    """A training set's prompts, all at once, would be gigabytes."""
    server = Server(good)
    asked_before = []
    whole = Prompts.of
    monkeypatch.setattr(
        Prompts, "of", lambda *given: asked_before.append(len(server.bodies)) or whole(*given)
    )
    try:
        sample(tmp_path, server.endpoint)
    finally:
        server.stop()
    assert len(asked_before) == len(PROBLEMS)
    ahead = [number - asked for number, asked in enumerate(asked_before)]
    assert max(ahead) <= 4 + 1, "those that are in flight, and the next"


def test_rollouts_that_are_not_there_are_not_promised(tmp_path):
    with RolloutStore(tmp_path) as store:
        store.append("train", [Rollout("r", "p0", (1,))])
        assert StoredRollouts(store, [("train", 0, "p0", 0)])[0].response_id == "r"
        with pytest.raises(RolloutError, match=r"lacks 1 rollouts, first \('train', 0, 'p0', 1\)"):
            StoredRollouts(store, [("train", 0, "p0", 0), ("train", 0, "p0", 1)])
