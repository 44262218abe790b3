"""How the embedded student and teacher are made: two tiny Qwen3 models, trained from nothing.

The student has seen common operations more often than rare ones and two-argument operations hardly
at all; it is stopped while it still errs. The teacher has seen everything evenly, also with a
worked solution as a hint in front of the prompt, and also continuing responses that went wrong:
there the right next state is the one that follows from the state *written*, hint or no hint, which
is what makes its judgement of a student's own wrong rollout sensible.

``python -m nemo_paced.quickstart.models --out DIR`` makes both again (about three minutes).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from nemo_paced.quickstart.problems import (
    MAPS,
    MAX_LENGTH,
    MIN_LENGTH,
    NUM_OPS,
    NUM_STATES,
    OLD_OPS,
    OPS,
    PAIR_OPS,
    PAIR_SHARE,
    WORDS,
    World,
    window_ops,
)

PAD, EOS = "<pad>", "<eos>"
VOCABULARY = {word: index for index, word in enumerate([PAD, EOS, *WORDS])}
MAX_POSITIONS = 64
BATCH = 128


@dataclass(frozen=True, slots=True)
class Recipe:
    """Shape and training data of one embedded model.

    Attributes:
        tied: input and output embeddings are one.
        rarest: how often the rarest operation is seen, the most common one being 1.
        pair_share: share of the chains that hold two-argument operations.
        old_share: share of the sequences that are old skills (other chains and maps) until these
            are known; at most 0.3 from then on.
        hints: half of the prompts begin with the worked solution, and chains may hold errors.
        learning_rates: before and after the first of ``step_accuracies`` is reached.
        step_accuracies: the learning rate falls at the first and training ends at the second; mean
            probability of the right next state on evenly drawn chains.
        max_steps: steps after which training ends in any case.
    """

    hidden_size: int
    tied: bool
    rarest: float
    pair_share: float
    old_share: float
    hints: bool
    learning_rates: tuple[float, float]
    step_accuracies: tuple[float, float]
    max_steps: int


STUDENT = Recipe(96, True, 0.3, 0.005, 0.8, False, (2e-3, 3e-4), (0.72, 0.92), 5000)
TEACHER = Recipe(128, False, 1.0, PAIR_SHARE, 0.3, True, (2e-3, 3e-4), (0.9, 0.985), 4000)
KNOWN = 0.9  # step accuracy at which an old skill counts as known


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of one token a word, split at spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    ).save_pretrained(folder)


def make_model(recipe: Recipe, seed: int) -> torch.nn.Module:
    """An untrained Qwen3 model of two layers, in the recipe's shape."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(VOCABULARY),
            hidden_size=recipe.hidden_size,
            intermediate_size=2 * recipe.hidden_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=recipe.tied,
            bos_token_id=None,
            eos_token_id=VOCABULARY[EOS],
            pad_token_id=VOCABULARY[PAD],
        )
    )


class Diet:
    """Random training sequences of a recipe."""

    def __init__(self, world: World, recipe: Recipe, seed: int) -> None:
        self.world, self.recipe = world, recipe
        self.rng = np.random.default_rng([seed, 1])
        self.keep = np.geomspace(1.0, recipe.rarest, NUM_OPS)
        self.old_share = recipe.old_share

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels ``[b, s]``; -100: nothing is learnt (prompts, planted errors)."""
        rows = [self._sequence() for _ in range(BATCH)]
        length = max(len(ids) for ids, _ in rows)
        ids = torch.full((BATCH, length), VOCABULARY[PAD])
        labels = torch.full((BATCH, length), -100)
        for index, (tokens, learnt) in enumerate(rows):
            ids[index, : len(tokens)] = torch.tensor(tokens)
            labels[index, : len(tokens)] = torch.where(
                torch.tensor(learnt), torch.tensor(tokens), -100
            )
        return ids, labels

    def _sequence(self) -> tuple[list[int], list[bool]]:
        rng, kind = self.rng, self.rng.random()
        start = int(rng.integers(NUM_STATES))
        if kind < self.old_share / 2:
            length = int(rng.integers(MIN_LENGTH, 9))
            op = MAPS[int(rng.integers(len(MAPS)))]
            states = rng.integers(0, NUM_STATES, length).tolist()
            prompt = ["map", op, *(f"s{state}" for state in states), "="]
            written = right = [int(self.world.single[op][state]) for state in states]
        else:
            ops = self._ops(old=kind < self.old_share)
            prompt = ["solve", f"s{start}", *ops, "="]
            right = self.world.chain(start, ops)
            written = self._with_errors(start, ops) if self.recipe.hints else right
        if self.recipe.hints and rng.random() < 0.5:
            prompt = ["hint", *(f"s{state}" for state in right), ";", *prompt]
        if written is right:
            planted = [False] * len(right)
        else:
            follows = self._follows(start, ops, written)
            planted = [state != follow for state, follow in zip(written, follows, strict=True)]
        tokens = [VOCABULARY[w] for w in (*prompt, *(f"s{state}" for state in written), EOS)]
        return tokens, [False] * len(prompt) + [not p for p in planted] + [True]

    def _ops(self, *, old: bool) -> list[str]:
        rng = self.rng
        length = int(rng.integers(MIN_LENGTH, MAX_LENGTH + 1))
        if old:
            return [OLD_OPS[int(rng.integers(len(OLD_OPS)))] for _ in range(min(length, 8))]
        while True:
            ops = window_ops(rng, length)
            # a chain with a rare operation is mostly drawn again
            if rng.random() < min(self.keep[OPS.index(op)] for op in ops):
                break
        if rng.random() < self.recipe.pair_share:
            for position in rng.choice(length, max(1, length // 3), replace=False):
                ops[position] = PAIR_OPS[int(rng.integers(len(PAIR_OPS)))]
        return ops

    def _with_errors(self, start: int, ops: list[str]) -> list[int]:
        """The states as written: now and then a wrong one, from which the chain goes on."""
        if self.rng.random() < 0.5:
            return self.world.chain(start, ops)
        written, state, previous = [], start, start
        for op in ops:
            following = self.world.step(op, state, previous)
            if self.rng.random() < 0.12:
                following = int(self.rng.integers(NUM_STATES))
            previous, state = state, following
            written.append(following)
        return written

    def _follows(self, start: int, ops: list[str], written: list[int]) -> list[int]:
        """The states that the operations give on the states as written."""
        states = [start, *written]
        return [self.world.step(op, states[i], states[max(i - 1, 0)]) for i, op in enumerate(ops)]


def train(recipe: Recipe, seed: int, description: str) -> torch.nn.Module:
    """Train a model until the recipe's step accuracy, or for its most steps."""
    world = World()
    model, diet = make_model(recipe, seed), Diet(world, recipe, seed)
    even = replace(recipe, rarest=1.0, hints=False)
    probe = Diet(world, replace(even, old_share=0.0), seed + 1)
    old_probe = Diet(world, replace(even, old_share=1.0), seed + 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rates[0])
    coarse = True
    for step in track(range(recipe.max_steps), description=description):
        ids, labels = diet.batch()
        optimizer.zero_grad()
        model(ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20:
            continue
        if step_accuracy(model, old_probe.batch) >= KNOWN:
            diet.old_share = min(diet.old_share, 0.3)
        accuracy = step_accuracy(model, probe.batch)
        if coarse and accuracy >= recipe.step_accuracies[0] and diet.old_share <= 0.3:
            coarse = False
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rates[1]
        if not coarse and accuracy >= recipe.step_accuracies[1]:
            break
    return model


@torch.no_grad()
def step_accuracy(
    model: torch.nn.Module, batch: Callable[[], tuple[torch.Tensor, torch.Tensor]]
) -> float:
    """Mean probability of the right next token."""
    ids, labels = batch()
    logprobs = torch.log_softmax(model(ids).logits[:, :-1].float(), -1)
    wanted = labels[:, 1:]
    learnt = wanted != -100
    return float(logprobs.gather(-1, wanted.clamp_min(0)[..., None])[..., 0][learnt].exp().mean())


def make_models(folder: Path, *, seed: int = 0) -> None:
    """Write ``student`` and ``teacher`` as Hugging Face directories."""
    for name, recipe in (("student", STUDENT), ("teacher", TEACHER)):
        model = train(recipe, seed, f"training the {name}")
        pretrained: Any = model
        pretrained.save_pretrained(folder / name)
        write_tokenizer(folder / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the embedded models again.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "assets")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_models(arguments.out, seed=arguments.seed)
