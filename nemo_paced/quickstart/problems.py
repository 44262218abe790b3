"""The embedded problems: chains of operations on twenty states, with verifiable answers.

A problem is a start state and 2 to 12 operations; the response writes every intermediate state, and
the last one is the answer. A chain is solved when every step is, so the pass rate is about
(accuracy of a step) ^ length, and pass rates spread over (0, 1) where single-step tasks would give
0 or 1. An operation is a fixed random permutation of the states; a problem draws its operations
from a window of neighbours, so that difficulty varies by problem. Some problems also hold an
operation of two arguments (this state and the one before), which the student has hardly seen.

Two skills stand beside for measuring what is forgotten: chains over other permutations, and
element-wise maps.

``python -m nemo_paced.quickstart.problems --out DIR`` writes the problem files again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from nemo_paced.records import Problem

NUM_STATES, NUM_OPS, NUM_PAIR_OPS, NUM_OLD_OPS, NUM_MAPS = 20, 12, 4, 6, 6
MIN_LENGTH, MAX_LENGTH = 2, 12
PAIR_SHARE = 0.14  # share of the problems that hold two-argument operations

STATES = [f"s{i}" for i in range(NUM_STATES)]
OPS = [f"f{i}" for i in range(NUM_OPS)]
PAIR_OPS = [f"g{i}" for i in range(NUM_PAIR_OPS)]
OLD_OPS = [f"h{i}" for i in range(NUM_OLD_OPS)]
MAPS = [f"m{i}" for i in range(NUM_MAPS)]
WORDS = ["solve", "map", "=", "hint", ";", *STATES, *OPS, *PAIR_OPS, *OLD_OPS, *MAPS]


class World:
    """What the operations do: tables drawn once from a fixed seed.

    Attributes:
        single: operation -> permutation of the states, ``[NUM_STATES]``.
        pair: operation -> state after (state, state before), ``[NUM_STATES, NUM_STATES]``.
    """

    def __init__(self, seed: int = 17) -> None:
        rng = np.random.default_rng(seed)
        names = [*OPS, *OLD_OPS, *MAPS]
        self.single = {name: rng.permutation(NUM_STATES) for name in names}
        self.pair = {name: rng.integers(0, NUM_STATES, (NUM_STATES,) * 2) for name in PAIR_OPS}

    def step(self, op: str, state: int, previous: int) -> int:
        """The state after ``op``; ``previous`` is the state before ``state``."""
        if op in self.pair:
            return int(self.pair[op][state, previous])
        return int(self.single[op][state])

    def chain(self, start: int, ops: list[str]) -> list[int]:
        """All states of a chain after its start."""
        states, previous = [start], start
        for op in ops:
            states.append(self.step(op, states[-1], previous))
            previous = states[-2]
        return states[1:]


def chain_problem(
    world: World, rng: np.random.Generator, name: str, ops: list[str], group: str
) -> Problem:
    """A problem of ``ops`` on a random start state, with its worked solution."""
    start = int(rng.integers(NUM_STATES))
    states = world.chain(start, ops)
    return Problem(
        id=name,
        problem=f"solve s{start} {' '.join(ops)} =",
        answer=f"s{states[-1]}",
        solution=" ".join(f"s{state}" for state in states),
        group=group,
    )


def window_ops(rng: np.random.Generator, length: int) -> list[str]:
    """Operations from a window of three neighbours: some windows hold common ones alone."""
    centre = int(rng.integers(NUM_OPS))
    return [OPS[(centre + int(rng.integers(-1, 2))) % NUM_OPS] for _ in range(length)]


def train_problem(world: World, rng: np.random.Generator, name: str) -> Problem:
    """A problem of the distilled distribution."""
    ops = window_ops(rng, int(rng.integers(MIN_LENGTH, MAX_LENGTH + 1)))
    group = "chain"
    if rng.random() < PAIR_SHARE:
        group = "pair"
        for position in rng.choice(len(ops), max(1, len(ops) // 3), replace=False):
            ops[position] = PAIR_OPS[int(rng.integers(NUM_PAIR_OPS))]
    return chain_problem(world, rng, name, ops, group)


def old_skill_problem(world: World, rng: np.random.Generator, name: str) -> Problem:
    """A problem of a skill that the student has and that distillation does not train."""
    length = int(rng.integers(MIN_LENGTH, 9))
    if rng.random() < 0.5:
        ops = [OLD_OPS[int(rng.integers(NUM_OLD_OPS))] for _ in range(length)]
        return chain_problem(world, rng, name, ops, "old chain")
    op = MAPS[int(rng.integers(NUM_MAPS))]
    states = rng.integers(0, NUM_STATES, length)
    mapped = [f"s{world.single[op][state]}" for state in states]
    return Problem(
        id=name,
        problem=f"map {op} {' '.join(f's{state}' for state in states)} =",
        answer=mapped[-1],
        solution=" ".join(mapped),
        group="map",
    )


def write_problems(
    folder: Path, *, seed: int = 5, sizes: tuple[int, int, int] = (512, 192, 128)
) -> None:
    """Training, held-out and forgetting problems as JSONL, none of them twice."""
    world, rng = World(), np.random.default_rng(seed)
    seen: set[str] = set()
    makers = {
        "problems_train": (train_problem, sizes[0]),
        "problems_heldout": (train_problem, sizes[1]),
        "problems_forgetting": (old_skill_problem, sizes[2]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, (make, count) in makers.items():
        problems: list[Problem] = []
        while len(problems) < count:
            problem = make(world, rng, f"{name.removeprefix('problems_')}-{len(problems):04d}")
            if problem.problem not in seen:
                seen.add(problem.problem)
                problems.append(problem)
        lines = (json.dumps(problem.content()) + "\n" for problem in problems)
        (folder / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the embedded problem files again.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets")
    parser.add_argument("--seed", type=int, default=5)
    arguments = parser.parse_args()
    write_problems(arguments.out, seed=arguments.seed)
