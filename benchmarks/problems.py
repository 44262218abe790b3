"""Seconds and memory until a training set of many problems is read and checked, and once more.

Beside it the way of verl's trainers: `datasets` reads the rows and filters them by the length of
the chat that the tokenizer renders (`maybe_filter_out_long_prompts`). Rows are made up, about as
long as those of OpenR1-Math. The tokenizer is a real one, of any Hugging Face directory with a chat
template (`python -m nemo_paced.quickstart.smollm2` makes one without a network).

    python benchmarks/problems.py --model runs/smollm2/model --problems 64 200000 1000000
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIMIT, TEACHER_LIMIT = 1024, 3072
NAMES = ("triangle", "sequence", "function", "circle", "integer", "graph", "matrix", "ratio")
ARMS = ("nemo_paced", "nemo_paced, resumed", "datasets, as verl", "datasets, as verl, again")


def write_problems(path: Path, count: int) -> None:
    """Statements of 240 characters in the mean, solutions of 1,200; no prompt is too long."""
    rng = random.Random(count)

    def sentences(characters: float) -> str:
        text = ""
        while len(text) < characters:
            first, second = rng.choice(NAMES), rng.choice(NAMES)
            text += f"The {first} $x_{{{rng.randrange(99)}}}$ of the {second} is "
            text += f"\\frac{{{rng.randrange(10**4)}}}{{{rng.randrange(1, 99)}}}. "
        return text

    with path.open("w") as file:
        for number in range(count):
            statement = sentences(min(rng.lognormvariate(5.2, 0.6), 1200))
            row = {
                "problem": f"{statement}Find case {number}.",
                "answer": str(rng.randrange(10**4)),
                "solution": sentences(min(rng.lognormvariate(6.7, 0.7), 4000)),
                "uuid": f"u{number}",
            }
            file.write(json.dumps(row) + "\n")


def ours(path: Path, folder: Path, model: Path) -> int:
    """Problems that are ready, as `train` makes them so."""
    from nemo_paced.config import DataConfig, PrivilegedContext
    from nemo_paced.data.prompts import PromptKind, Prompts
    from nemo_paced.run.problems import RunProblems

    data = DataConfig(max_prompt_length=LIMIT, max_teacher_prompt_length=TEACHER_LIMIT)
    kept, key = RunProblems(folder), "data.problems"
    problems = kept.read(path, key=key, data=data)
    prompts = Prompts(model, data, PrivilegedContext.none)
    for kind in (PromptKind.student, PromptKind.teacher):
        kept.check(problems, prompts, kind, key=key)
    return len(problems)


def peers(path: Path, folder: Path, model: Path) -> int:
    """Problems that are left, as verl's dataset filters them; for one kind of prompts."""
    os.environ["HF_DATASETS_CACHE"] = str(folder)
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder))

    def fits(row: dict[str, Any]) -> bool:
        turns = [{"role": "user", "content": row["problem"]}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        return len(ids) <= LIMIT

    return len(rows.filter(fits, num_proc=os.cpu_count()))


def measure(arm: str, path: Path, folder: Path, model: Path) -> dict[str, float]:
    """Seconds and peak memory of one arm, in this process; imports are not counted."""
    import datasets  # noqa: F401
    import pyarrow  # noqa: F401
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(str(model), local_files_only=True)  # imports more
    run = ours if arm.startswith("nemo_paced") else peers
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    count = run(path, folder, model)
    took = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"problems": count, "seconds": took, "mib_above_imports": (peak - before) / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--problems", type=int, nargs="+", default=[64, 200_000])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # arm, file, folder
    options = parser.parse_args()
    if options.measure is not None:
        arm, path, folder = options.measure
        print(json.dumps(measure(arm, Path(path), Path(folder), options.model)))
        return
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for count in options.problems:
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "problems.jsonl"
            write_problems(path, count)
            found = figures[str(count)] = {}
            for arm in options.arms:
                kept = Path(name) / arm.split(",")[0]
                command = [sys.executable, __file__, "--model", str(options.model)]
                done = subprocess.run(
                    [*command, "--measure", arm, str(path), str(kept)],
                    capture_output=True, check=True, text=True,
                )  # fmt: skip
                found[arm] = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"{count:>9,}  {arm:<26}{found[arm]['seconds']:8.2f} s "
                    f"{found[arm]['mib_above_imports']:8.0f} MiB",
                    flush=True,
                )
    if options.out is not None:
        machine = {"cores": os.cpu_count(), "load": os.getloadavg()[0]}
        options.out.write_text(json.dumps({"machine": machine, "runs": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
