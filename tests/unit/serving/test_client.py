"""The client against servers that answer wrongly on purpose (a healthy one is in tests/slow)."""

import os
import threading
import time

import pytest

from nemo_paced.errors import RolloutError
from nemo_paced.serving import balancer
from nemo_paced.serving import client as client_module
from nemo_paced.serving.client import RolloutClient
from nemo_paced.serving.completions import SampleRequest
from tests.unit.serving.wrong_server import (
    COMPLETIONS,
    GENERATE,
    HANG,
    RESET,
    Server,
    choice,
    good,
)

GOOD = {"choices": [choice(1), choice(0, (6, 7, 1), (-1.0, -2.0, -3.0))]}
SHORT = {"choices": [choice(0)]}


@pytest.fixture(params=[GENERATE, COMPLETIONS])
def serve(request, monkeypatch):
    """Starts servers that have one of the two routes: the tests hold for both."""
    monkeypatch.setattr(client_module, "FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(balancer, "FIRST_PROBE_S", 0.01)
    servers = []

    def start(*answers, **behaviour):
        servers.append(Server(*answers, **{"route": request.param, **behaviour}))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def connect(*servers, **options):
    options = {"max_retries": 2, "request_timeout_s": 5, "patience_s": 2, **options}
    return RolloutClient([server.endpoint for server in servers], "the-key", **options)


def request(key, n=2):
    return SampleRequest(key, (3, 4), n, 11, 1.0, 1.0, 9, (1,))


def ask(client, *keys):
    answers = {}
    client.sample([request(key) for key in keys], lambda r, c: answers.__setitem__(r.key, c))
    return answers


def test_token_ids_travel_both_ways_and_samples_come_in_order(serve):
    server = serve(GOOD)
    (completions,) = ask(connect(server), "p").values()
    assert [c.token_ids for c in completions] == [(6, 7, 1), (5, 1)]
    assert completions[0].logprobs == (-1.0, -2.0, -3.0)
    body = server.bodies[0]
    assert body["prompt" if server.route == COMPLETIONS else "token_ids"] == [3, 4]
    assert body["n"] == 2 and body["seed"] == 11 and body["logprobs"] == 0
    assert body["max_tokens"] == 9 and body["stop_token_ids"] == [1]
    assert server.headers[0]["Authorization"] == "Bearer the-key"


@pytest.mark.parametrize(
    "bad",
    [
        (500, {"error": "boom"}),
        (503, {}),
        RESET,
        {"choices": [choice(0), choice(1, reason="abort")]},
    ],
)
def test_a_server_at_fault_is_asked_again_a_bounded_number_of_times(serve, bad):
    server = serve(bad, bad, GOOD)
    assert len(ask(connect(server), "p")["p"]) == 2
    assert len(server.bodies) == 3
    with pytest.raises(RolloutError, match=r"2 responses to problem 'p' failed 3 times, last at"):
        ask(connect(serve(bad)), "p")


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (SHORT, "1 samples came, 2 were asked for"),
        (b"no json", "no JSON"),
        (b'{"choices": 3}', "no list of samples"),
        ({"choices": [choice(0), choice(1, logprobs=(-1.0,))]}, "2 tokens has 1 log-probabilities"),
        ({"choices": [choice(0), choice(1, tokens=(), logprobs=())]}, "a sample of 0 tokens"),
        ({"choices": [choice(0), choice(1, reason="strange")]}, "ended by 'strange'"),
        ({"choices": [choice(0), choice(1, reason="length")]}, "2 tokens ended by 'length'; the"),
        ({"choices": [choice(0), choice(1, logprobs=(None, -1.0))]}, "no list of samples"),
        ({"choices": [choice(0), choice(1, logprobs=(-9999.0, -1.0))]}, "no finite log-prob"),
        ({"choices": [choice(0), choice(1, (5,) * 10, (-1.0,) * 10)]}, "10 tokens ended by 'stop'"),
    ],
)
def test_a_wrong_answer_is_refused_by_name_and_not_asked_for_again(serve, bad, told):
    server = serve(bad)
    with pytest.raises(RolloutError, match=f"answered wrongly for problem 'p': .*{told}"):
        ask(connect(server), "p")
    assert len(server.bodies) == 1


@pytest.mark.parametrize("status", [302, 400, 401, 422])
def test_a_refusal_is_not_tried_again(serve, status):
    server = serve((status, {"error": "key"}))
    with pytest.raises(RolloutError, match=f"refused to sample problem 'p': {status}"):
        ask(connect(server), "p")
    assert len(server.bodies) == 1


@pytest.mark.parametrize("no_route", [403, 404, 405, 501])
def test_a_server_without_the_token_route_is_asked_by_the_other_one(serve, no_route, caplog):
    caplog.set_level("INFO")
    plain = serve(good, route=COMPLETIONS, no_route=no_route)
    client = connect(plain, max_in_flight=4)
    assert len(ask(client, *map(str, range(20)))) == 20
    assert 1 <= plain.turned_away <= 4, "only what was sent before the first answer"
    assert caplog.text.count("does not tell the version of the weights") == 1
    turned_away = plain.turned_away
    (completion, _) = ask(client, "p")["p"]
    assert plain.turned_away == turned_away, "found out once"
    assert completion.weight_versions == ()


def test_a_server_that_decodes_fewer_sequences_at_once_is_refused_with_the_remedy(serve):
    told = b'{"error": {"message": "sampling_params.n must be at most the server\'s max_num_seqs"}}'
    server = serve(good, route=COMPLETIONS, no_route=400, told_there=told)
    with pytest.raises(
        RolloutError, match=r"'p': 400 .*: set rollout.max_num_seqs to this server's"
    ):
        ask(connect(server), "p")
    other = serve(good, route=COMPLETIONS, no_route=400, told_there=b"{}")
    with pytest.raises(RolloutError, match=r"refused to sample problem 'p': 400 {}$"):
        ask(connect(other), "p")


def test_each_server_is_asked_by_its_own_route(serve):
    servers = serve(good, route=COMPLETIONS, delay=0.02), serve(good, route=GENERATE, delay=0.02)
    assert len(ask(connect(*servers, max_in_flight=2), *map(str, range(20)))) == 20
    assert all(server.bodies for server in servers) and not servers[1].turned_away


def span(version, start, end):
    return {"version": version, "start": start, "end": end}


def test_the_weight_versions_of_the_tokens_come_along(serve):
    tokens, logprobs = (5, 6, 7, 1), (-1.0,) * 4
    versions = [span("7", 0, 3), span("8", 3, 4)]
    server = serve(
        {"choices": [choice(0, tokens, logprobs, versions=versions), choice(1)]}, route=GENERATE
    )
    first, second = ask(connect(server), "p")["p"]
    assert first.weight_versions == (("7", 3), ("8", 1)) and second.weight_versions == ()
    server = serve(
        {"choices": [choice(0, tokens, logprobs, versions=versions[:1]), choice(1)]}, route=GENERATE
    )
    with pytest.raises(RolloutError, match="4 tokens has weight versions of 3"):
        ask(connect(server), "p")


def test_what_finished_before_an_error_was_handed_over(serve):
    client = connect(serve(GOOD, (400, {})), max_in_flight=1)
    answers = {}

    def slowly(asked, completions):
        time.sleep(0.3)  # the error of b comes while a is being graded
        answers[asked.key] = completions

    with pytest.raises(RolloutError, match="problem 'b'"):
        client.sample([request("a"), request("b")], slowly)
    assert list(answers) == ["a"]


def test_an_error_of_the_caller_stops_the_sampling(serve):
    def full(asked, completions):
        raise RolloutError("the disk is full")

    with pytest.raises(RolloutError, match="the disk is full"):
        connect(serve(good)).sample([request("a")], full)


def test_requests_in_flight_are_bounded_and_the_order_is_kept(serve):
    server = serve(good, delay=0.05)
    ask(connect(server, max_in_flight=3), *"abcdefghij")
    assert 1 < server.most_in_flight <= 3
    server = serve(good)
    client = connect(server, max_in_flight=1)
    client.sample([request("a", n=n) for n in (5, 3, 4)], lambda r, c: None)
    assert [body["n"] for body in server.bodies] == [5, 3, 4]


def test_an_error_while_requests_are_made_is_raised_and_what_came_is_kept(serve, monkeypatch):
    monkeypatch.setattr("nemo_paced.serving.client.HANDING_OVER", 1)
    finished = []

    def requests():
        yield from (request(key) for key in "abc")
        raise KeyError("no such prompt")  # "a" is being stored and "b" waits for it

    def slowly(asked, completions):
        time.sleep(0.3)
        finished.append(asked.key)

    with pytest.raises(KeyError, match="no such prompt"):
        connect(serve(good), max_in_flight=1).sample(requests(), slowly)
    assert finished[:2] == ["a", "b"]


def test_requests_are_spread_by_load(serve):
    quick, slow = serve(good, delay=0.01), serve(good, delay=1.0)
    assert len(ask(connect(quick, slow, max_in_flight=2), *map(str, range(40)))) == 40
    assert len(quick.bodies) + len(slow.bodies) == 40
    assert len(quick.bodies) > 3 * len(slow.bodies) > 0


@pytest.mark.parametrize("fault", [HANG, RESET])
def test_other_servers_take_over_from_one_that_does_not_answer(serve, fault, caplog):
    bad, well = serve(fault, healthy=False), serve(good)
    client = connect(bad, well, max_in_flight=4, request_timeout_s=1)
    began = time.monotonic()
    assert len(ask(client, *map(str, range(30)))) == 30
    assert time.monotonic() - began < 6
    assert 0 < len(bad.bodies) <= 8, "nothing more is sent to it"
    assert f"{bad.endpoint} does not answer" in caplog.text
    if fault == HANG:
        assert "no answer within 1 s" in caplog.text or "ReadTimeout" in caplog.text


def test_a_server_that_answers_again_gets_requests_again(serve):
    flaky, other = serve(RESET, good, delay=0.02), serve(good, delay=0.02)
    ask(connect(flaky, other, max_in_flight=1), *map(str, range(60)))
    assert flaky.probes >= 1 and len(flaky.bodies) > 5


def test_a_dead_server_is_brought_back_by_its_owner(serve):
    server = serve(RESET, good)
    revived = []

    def revive(endpoint):
        revived.append((endpoint, threading.current_thread() is threading.main_thread()))
        return len(revived) > 1

    assert len(ask(connect(server, revive=revive), "a", "b")) == 2
    assert revived == [(server.endpoint, False)] * 2

    def give_up(endpoint):
        raise RolloutError("died 3 times")

    with pytest.raises(RolloutError, match="died 3 times"):
        ask(connect(serve(RESET), revive=give_up), "a")


def test_a_dead_server_is_brought_back_while_all_results_wait_to_be_stored(serve, monkeypatch):
    monkeypatch.setattr(balancer, "FIRST_PROBE_S", 0.5)  # the results wait by then
    revived, stored = threading.Event(), []

    def revive(endpoint):
        revived.set()
        return True

    client = connect(serve(RESET, good), serve(good), revive=revive)
    client.sample(
        [request(str(i)) for i in range(60)], lambda *_: stored.append(revived.wait(timeout=20))
    )
    assert stored == [True] * 60


def test_with_no_server_left_each_is_named(serve):
    servers = serve(RESET, healthy=False), serve(RESET, healthy=False)
    with pytest.raises(RolloutError, match=r"no rollout server has answered for 0\.5 s") as caught:
        ask(connect(*servers, patience_s=0.5, max_retries=9), "p")
    assert all(server.endpoint in str(caught.value) for server in servers)


def test_nobody_listening_is_an_error():
    client = RolloutClient(["http://127.0.0.1:9"], "k", max_retries=0)
    with pytest.raises(RolloutError, match="failed 1 times"):
        ask(client, "p")
    with pytest.raises(RolloutError, match="/pause"):
        client.call("POST", "/pause")
    assert not client.healthy("http://127.0.0.1:9")


def test_proxies_of_the_environment_are_not_asked(serve, monkeypatch):
    proxy, server = serve((502, {})), serve(good)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.endpoint)
    monkeypatch.setenv("no_proxy", "")
    assert "http_proxy" in os.environ
    assert len(ask(connect(server), "p")["p"]) == 2
    connect(server).call("GET", "/health")
    assert not proxy.bodies and not proxy.probes
