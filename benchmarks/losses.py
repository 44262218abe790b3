"""Time and memory of next-token divergence losses, ours beside the peers', forward and backward.

All contenders of a form run in one process on the same inputs, turn by turn, so that what disturbs
the machine disturbs all alike. Each is first checked against float64 on a few tokens: the figures
compare implementations of one number. The objective is the mean over tokens. See ``README.md``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import warnings
from pathlib import Path

import torch
from contenders import Absent, all_contenders
from floors import Probe, copy_probe, gemm_probe
from measure import Row, measure
from reference import KINDS, Linear, Logits, make_linear, make_logits
from report import make_report, print_tables

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    args = parse_arguments()
    load_before = os.getloadavg()[0]  # above 0 something else was running
    warnings.filterwarnings("ignore")  # peers' notices at import
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    rows: list[Row] = []
    absent: list[Absent] = []
    floors: dict[str, float | list[float]] = {}
    for form in args.forms:
        inputs, probe = prepare(form, args, dtype, device)
        found = [c for c in all_contenders(args.kinds, device, args.chunk_size) if c.form == form]
        measured, missing = measure(found, inputs, probe, args, floors)
        rows += measured
        absent += missing
        del inputs, probe
        gc.collect()
    report = make_report(args, load_before, rows, absent, floors)
    print_tables(report)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, nargs=2, default=(1024, 2048), metavar=("S", "T"))
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch on the CPU")
    parser.add_argument("--repeats", type=int, default=7, help="timed turns of each contender")
    parser.add_argument("--warm-up", type=int, default=1, help="turns before them")
    parser.add_argument("--check-tokens", type=int, default=4, help="compared with float64")
    parser.add_argument("--chunk-size", type=int, help="tokens a chunk of ours; else its default")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument(
        "--forms", nargs="+", choices=("logits", "linear"), default=("logits", "linear")
    )
    parser.add_argument("--out", type=Path, help="JSON with every figure")
    return parser.parse_args()


def prepare(
    form: str, args: argparse.Namespace, dtype: torch.dtype, device: torch.device
) -> tuple[Logits | Linear, Probe]:
    """Inputs of a form and the probe of its floor."""
    if form == "logits":
        logits = make_logits(args.tokens, args.vocab, dtype, device)
        return logits, copy_probe(logits)
    linear = make_linear(args.tokens, args.vocab, args.hidden, dtype, device)
    return linear, gemm_probe(linear)


if __name__ == "__main__":
    main()
