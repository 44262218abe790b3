"""The client against a server that answers wrongly on purpose (a healthy one is in tests/slow)."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nemo_paced.errors import RolloutError
from nemo_paced.rollout import client as client_module
from nemo_paced.rollout.client import RolloutClient, SampleRequest


def choice(index, tokens=(5, 1), logprobs=(-0.5, -0.25), reason="stop"):
    return {
        "index": index,
        "token_ids": list(tokens),
        "logprobs": {"token_logprobs": list(logprobs)},
        "finish_reason": reason,
    }


GOOD = {"choices": [choice(1), choice(0, (6, 7, 1), (-1.0, -2.0, -3.0))]}


class Script:
    """Answers in order; the last one is repeated."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.bodies = []
        self.headers = []


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_RETRY_S", 0.01)
    servers = []

    def start(script):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                length = int(self.headers["Content-Length"])
                script.bodies.append(json.loads(self.rfile.read(length)))
                script.headers.append(dict(self.headers))
                answer = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
                status, body = answer if isinstance(answer, tuple) else (200, answer)
                payload = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        return RolloutClient([endpoint], "the-key", max_retries=2, request_timeout_s=5)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(client, *keys):
    answers = {}
    requests = [SampleRequest(key, (3, 4), 2, 11, 1.0, 1.0, 9, (1,)) for key in keys]
    client.sample(requests, on_result=lambda r, c: answers.__setitem__(r.key, c))
    return answers


def test_token_ids_travel_both_ways_and_samples_come_in_order(serve):
    script = Script(GOOD)
    (completions,) = ask(serve(script), "p").values()
    assert [c.token_ids for c in completions] == [(6, 7, 1), (5, 1)]
    assert completions[0].logprobs == (-1.0, -2.0, -3.0)
    body = script.bodies[0]
    assert body["prompt"] == [3, 4] and body["n"] == 2 and body["seed"] == 11
    assert script.headers[0]["Authorization"] == "Bearer the-key"


SHORT = {"choices": [choice(0)]}


@pytest.mark.parametrize(
    "bad",
    [
        SHORT,
        (500, {"error": "boom"}),
        b"no json",
        {"choices": [choice(0), choice(1, logprobs=(-1.0,))]},
        {"choices": [choice(0), choice(1, tokens=(), logprobs=())]},
        {"choices": [choice(0), choice(1, reason="abort")]},
    ],
)
def test_a_bad_answer_is_asked_for_again_a_bounded_number_of_times(serve, bad):
    script = Script(bad, bad, GOOD)
    assert len(ask(serve(script), "p")["p"]) == 2
    assert len(script.bodies) == 3
    with pytest.raises(RolloutError, match=r"2 responses to problem 'p' failed 3 times"):
        ask(serve(Script(bad)), "p")


def test_fewer_samples_than_asked_are_named(serve):
    with pytest.raises(RolloutError, match="1 samples came, 2 were asked for"):
        ask(serve(Script(SHORT)), "p")


def test_a_refusal_is_not_tried_again(serve):
    script = Script((401, {"error": "key"}))
    with pytest.raises(RolloutError, match="refused to sample problem 'p': 401"):
        ask(serve(script), "p")
    assert len(script.bodies) == 1


def test_what_finished_before_an_error_was_handed_over(serve):
    client = serve(Script(GOOD, (400, {})))
    client.max_in_flight = 1
    answers = {}
    requests = [SampleRequest(key, (3,), 2, 1, 1.0, 1.0, 9, (1,)) for key in "ab"]
    with pytest.raises(RolloutError):
        client.sample(requests, on_result=lambda r, c: answers.__setitem__(r.key, c))
    assert list(answers) == ["a"]


def test_nobody_listening_is_an_error():
    client = RolloutClient(["http://127.0.0.1:9"], "k", max_retries=0)
    with pytest.raises(RolloutError, match="failed 1 times"):
        ask(client, "p")
    with pytest.raises(RolloutError, match="/pause"):
        client.call("POST", "/pause")
