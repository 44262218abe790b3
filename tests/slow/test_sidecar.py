import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
import torch

from nemo_paced.config import WeightSwap
from nemo_paced.errors import RolloutError
from nemo_paced.refit.file_transfer import send_files
from nemo_paced.refit.weight_sync import WeightSync
from nemo_paced.serving.client import RolloutClient
from nemo_paced.serving.completions import SampleRequest
from nemo_paced.serving.vllm_engine import COMPLETIONS
from tests.rollout_servers import make_sidecar
from tests.tiny import make_hf_model

pytestmark = pytest.mark.slow

SHAPE = {"vocab_size": 128, "hidden_size": 64}
ROUTES = (
    ("GET", "/health"),
    ("GET", "/v1/models"),
    ("POST", "/v1/completions"),
    ("POST", "/inference/v1/generate"),
    ("POST", "/inference/v1/abort_requests"),
    ("POST", "/pause"),
    ("POST", "/resume"),
    ("POST", "/init_weight_transfer_engine"),
    ("POST", "/start_weight_update"),
    ("POST", "/update_weights"),
    ("POST", "/finish_weight_update"),
    ("GET", "/weight_info"),
    ("POST", "/weight_checker"),
    ("POST", "/reset_prefix_cache"),
    ("POST", "/collective_rpc"),
    ("GET", "/metrics"),
)

# Runs for seconds, to be met by an update. A step has to take longer than vLLM's front end needs
# for its tokens: a front end that is behind the engine, as on a busy machine, answers no other
# request before the last token (its output handler yields only when its queue is empty).
SLOW_SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
LONG = {"key": "p", "prompt_ids": (3, 4, 5), "n": 2, "temperature": 1.0, "top_p": 1.0}
LONG |= {"max_tokens": 500, "stop_token_ids": ()}


def request(key="p", prompt=(3, 4, 5), n=2, seed=1, max_tokens=6):
    return SampleRequest(key, prompt, n, seed, 1.0, 1.0, max_tokens, (2,))


def sample(client, *requests):
    answers = {}
    client.sample(requests, on_result=lambda asked, got: answers.__setitem__(asked.key, got))
    return answers


def transformers_logprobs(folder, prompt, response):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids).logits[0].double(), -1)
    first = len(prompt) - 1
    return [float(logprobs[first + t, token]) for t, token in enumerate(response)]


def worst_gap(folder, client, prompt=(3, 4, 5)):
    (completions,) = sample(client, request(prompt=prompt, n=4, max_tokens=8)).values()
    return max(
        abs(a - b)
        for c in completions
        for a, b in zip(c.logprobs, transformers_logprobs(folder, prompt, c.token_ids), strict=True)
    )


def check_the_other_route_gives_the_same(client, generated):
    """As from a server without the token route: nothing but the versions is missing."""
    plain = client.only(client.endpoints[0], timeout_s=60)
    plain._routes[client.endpoints[0]] = COMPLETIONS
    completed = sample(plain, request(seed=5, n=3))["p"]
    assert [c.token_ids for c in completed] == [c.token_ids for c in generated]
    for a, b in zip(completed, generated, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
        assert a.finish_reason == b.finish_reason and a.weight_versions == ()


def test_a_response_under_way_at_an_update_says_which_tokens_are_of_which_weights(tmp_path):
    shape = {**SHAPE, **SLOW_SHAPE, "max_position_embeddings": 512}
    models = [make_hf_model("qwen3", tmp_path / f"m{i}", seed=i, **shape) for i in range(2)]
    sidecar = make_sidecar(models[0], tmp_path, max_model_len=512)
    with sidecar, ThreadPoolExecutor(1) as pool:
        sidecar.start()
        client = RolloutClient([sidecar.endpoint], sidecar.served.api_key)
        sync = WeightSync(client, WeightSwap.in_flight)
        old = "default"  # what vLLM calls the weights that it started with
        sample(client, request())  # the first one compiles
        for update in range(1, 9):  # on a busy machine the pause may come behind the last token
            sampling = pool.submit(sample, client, SampleRequest(**LONG, seed=update))
            time.sleep(0.3)
            send_files(sync, [models[update % 2] / "model.safetensors"], str(update))
            completions = sampling.result()["p"]
            assert {c.weight_versions[-1][0] for c in completions} <= {old, str(update)}
            if all(len(c.weight_versions) == 2 for c in completions):
                break
            old = str(update)
        for completion in completions:
            (first, before), (second, after) = completion.weight_versions
            assert (first, second) == (old, str(update))
            assert before > 0 and after > 0 and before + after == 500
            for model, tokens in (
                (models[(update - 1) % 2], slice(0, before)),
                (models[update % 2], slice(before, None)),
            ):
                expected = transformers_logprobs(model, LONG["prompt_ids"], completion.token_ids)
                assert completion.logprobs[tokens] == pytest.approx(expected[tokens], abs=1e-3)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_tied"])
def test_served_weights_follow_each_update_and_every_route_asks_for_the_key(family, tmp_path):
    models = [make_hf_model(family, tmp_path / f"m{i}", seed=i, **SHAPE) for i in range(3)]
    sidecar = make_sidecar(models[0], tmp_path)
    with sidecar:
        sidecar.start()
        assert sidecar.served.api_key not in (tmp_path / "sidecar.log").read_text()
        with httpx.Client(trust_env=False) as stranger:
            for method, path in ROUTES:
                for headers in ({}, {"Authorization": "Bearer wrong"}):
                    answer = stranger.request(method, sidecar.endpoint + path, headers=headers)
                    assert answer.status_code == 401, (method, path)
        client = RolloutClient([sidecar.endpoint], sidecar.served.api_key)
        sync = WeightSync(client, WeightSwap.between_requests)
        assert worst_gap(models[0], client) < 1e-4
        for version, model in enumerate([models[1], models[2], models[0]]):
            send_files(sync, [model / "model.safetensors"], str(version))
            assert worst_gap(model, client) < 1e-4
            assert client.control.weight_versions() == [str(version)]
            for completion in sample(client, request())["p"]:
                assert completion.weight_versions == ((str(version), len(completion.token_ids)),)
        # the same seed gives the same samples; another one others
        first, again, other = (sample(client, request(seed=s, n=3))["p"] for s in (5, 5, 6))
        assert [c.token_ids for c in first] == [c.token_ids for c in again]
        assert [c.token_ids for c in first] != [c.token_ids for c in other]
        assert len({c.token_ids for c in first}) > 1, "samples of one request differ"
        check_the_other_route_gives_the_same(client, first)
        # the stop token is part of the response, a cut one says so
        for completion in sample(client, request(n=32, max_tokens=40))["p"]:
            if completion.finish_reason == "stop":
                assert completion.token_ids[-1] == 2
            else:
                assert len(completion.token_ids) == 40 and 2 not in completion.token_ids
            assert all(math.isfinite(x) and x <= 0 for x in completion.logprobs)
        # a server that dies is an error, and starts again
        group = subprocess.run(
            ["pgrep", "-P", str(sidecar._process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        os.killpg(int(group[0]), signal.SIGKILL)
        fast = RolloutClient(
            [sidecar.endpoint], sidecar.served.api_key, max_retries=1, patience_s=5
        )
        with pytest.raises(RolloutError, match=r"failed 2 times|no rollout server"):
            sample(fast, request())
        deadline = time.monotonic() + 10
        while sidecar.alive() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not sidecar.alive()
        sidecar.restart()
        assert worst_gap(models[0], client) < 1e-4
    assert not sidecar.alive()


def test_a_server_that_cannot_start_shows_the_end_of_its_log(tmp_path):
    (tmp_path / "empty").mkdir()
    sidecar = make_sidecar(tmp_path / "empty", tmp_path)
    with sidecar, pytest.raises(RolloutError, match="ended while starting") as caught:
        sidecar.start()
    assert "config.json" in str(caught.value) or "model" in str(caught.value)


def works(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("killed", ["parent", "supervisor", "leader", "server"])
def test_nothing_is_left_when_one_of_them_is_killed(killed):
    server = "import os, time; os.fork(); time.sleep(600)"
    program = (
        "import subprocess, sys, time;"
        "subprocess.Popen([sys.executable, '-m', 'nemo_paced.serving.supervisor',"
        f"sys.executable, '-c', {server!r}], stdin=subprocess.PIPE); time.sleep(600)"
    )
    parent = psutil.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 30
    while len(family := parent.children(recursive=True)) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    # each is the child of the one before; the last is a helper of the server
    names = ("parent", "supervisor", "leader", "server")
    assert len(family) == len(names)
    dict(zip(names, [parent, *family], strict=False))[killed].kill()
    deadline = time.monotonic() + 20
    while (left := [p for p in family if works(p)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    for process in left:
        process.kill()
    assert not left
