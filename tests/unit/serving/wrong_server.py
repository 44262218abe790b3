"""A server that speaks vLLM's protocol wrongly on purpose, as a healthy one cannot be made to."""

import contextlib
import json
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HANG, RESET = "hang", "reset"
COMPLETIONS, GENERATE = "/v1/completions", "/inference/v1/generate"


def choice(index, tokens=(5, 1), logprobs=(-0.5, -0.25), reason="stop", versions=None):
    """A sample in the words of ``/v1/completions``, which knows no versions."""
    return {
        "index": index,
        "token_ids": list(tokens),
        "logprobs": {"token_logprobs": list(logprobs)},
        "finish_reason": reason,
        "versions": versions,
    }


def in_words_of(route, answer):
    """The answer as this route gives it."""
    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
        return answer
    choices = []
    for given in answer["choices"]:
        said = {name: value for name, value in given.items() if name != "versions"}
        if route == GENERATE:
            logprobs = given["logprobs"]["token_logprobs"]
            said["logprobs"] = {"content": [{"logprob": value} for value in logprobs]}
            said["weight_versions"] = given["versions"]
        choices.append(said)
    return {"choices": choices}


def good(body):
    """n samples whose first token is the sample's index."""
    return {"choices": [choice(i, (i + 3, 1)) for i in reversed(range(body["n"]))]}


class Server:
    """Answers in order, the last one again and again.

    An answer is JSON, bytes, ``(status, JSON)``, ``HANG``, ``RESET``, or a function of the body.
    Bodies are kept with the sampling parameters beside the rest, whichever the route.

    Args:
        route: the one it has; at the other it answers ``no_route`` with ``told_there``.
    """

    def __init__(
        self, *answers, healthy=True, delay=0.0, route=COMPLETIONS, no_route=404, told_there=b"{}"
    ):
        self.answers = list(answers)
        self.route, self.no_route, self.turned_away = route, no_route, 0
        self.told_there = told_there
        self.healthy = healthy
        self.delay = delay
        self.bodies, self.headers, self.probes = [], [], 0
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def _take(self, body):
        with self._lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            self.bodies.append(body)
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def _handler(server):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                server.probes += 1
                self._answer(200 if server.healthy else 503, b"{}")

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path in (COMPLETIONS, GENERATE) and self.path != server.route:
                    server.turned_away += 1
                    self._answer(server.no_route, server.told_there)
                    return
                body |= body.pop("sampling_params", {})
                answer = server._take(body)
                server.headers.append(dict(self.headers))
                time.sleep(server.delay)
                with server._lock:
                    server.in_flight -= 1
                if answer == HANG:
                    server._stopped.wait(60)
                if answer in (HANG, RESET):
                    linger = struct.pack("ii", 1, 0)  # close with RST
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    self.connection.close()
                    self.close_connection = True
                    return
                answer = answer(body) if callable(answer) else answer
                status, content = answer if isinstance(answer, tuple) else (200, answer)
                content = in_words_of(server.route, content)
                self._answer(
                    status, content if isinstance(content, bytes) else json.dumps(content).encode()
                )

            def _answer(self, status, payload):
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                if 300 <= status < 400:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *args):
                pass

            def finish(self):
                with contextlib.suppress(OSError, ValueError):  # closed by a reset
                    super().finish()

        return Handler
