"""The Megatron-Core code of docs/library.md, run as it stands at several layouts."""

from functools import cache

import pytest
import torch

from nemo_paced.hf.directory import load_hf_config
from nemo_paced.hf.import_weights import load_hf_weights
from nemo_paced.hf.model import build_chunks
from nemo_paced.parallel import groups
from nemo_paced.student.model import build_student
from tests.distributed.harness import assert_same_steps, run_ranks
from tests.distributed.test_training import (
    LR,
    STEPS,
    VOCAB,
    make_config,
    make_items,
    reference_steps,
)
from tests.documents import ROOT, python_of
from tests.tiny import make_hf_model

PAGE = ROOT / "docs" / "library.md"
N = 9  # with seven responses: two problems have weight 0
LENGTH, TEACHER_LENGTH = 20, 28
# tensor, pipeline, ranks, micro-batch, sequence parallel
LAYOUTS = {
    "tp1": ("reverse_kl", (1, 1, 1, 4, False)),
    "tp2": ("forward_kl", (2, 1, 2, 2, False)),
    "tp2 sp": ("reverse_kl", (2, 1, 2, 2, True)),
    "pp2": ("forward_kl", (1, 2, 2, 2, False)),
    "dp2": ("forward_kl", (1, 1, 2, 2, False)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_hf_model("qwen3_tied", folder / "student", vocab_size=VOCAB + 3)
    make_hf_model("llama", folder / "teacher", seed=1, vocab_size=VOCAB + 3, hidden_size=64)
    return folder


def rows_of(step):
    """(prompt, teacher's prompt, response, weight) of the problems that are run.

    One of the two without weight is run, as a row in which no token is predicted.
    """
    items = make_items(step)
    rows = [
        (i.student_prompt_ids, i.teacher_prompt_ids, i.response_ids, N * i.token_weight)
        for i in items
    ]
    assert len(rows) == N - 2
    return [*rows, ((2,), (3,), (), 0.0)]


def padded(prompts, responses, length):
    """Tokens, positions and where a response token is predicted, [b, length]."""
    tokens = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        tokens[row, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
        mask[row, len(prompt) - 1 : len(prompt) + len(response) - 1] = True
    return {
        "tokens": tokens,
        "position_ids": torch.arange(length).expand_as(tokens),
        "loss_mask": mask,
    }


def batches_of(step, size, dp_rank, dp_size):
    """This rank's micro-batches; the first of all stands for the problem that is not run too."""
    rows, batches = rows_of(step), []
    for begin in range(0, len(rows), size):
        prompts, teacher_prompts, responses, weights = zip(*rows[begin : begin + size], strict=True)
        taught = padded(teacher_prompts, responses, TEACHER_LENGTH)
        batches.append(
            {
                **padded(prompts, responses, LENGTH),
                **{f"teacher_{key}": value for key, value in taught.items()},
                "weight": torch.tensor(weights),
                "num_problems": torch.tensor(size + (begin == 0), dtype=torch.int),
            }
        )
    return batches[dp_rank::dp_size]


def train(rank, world_size, folder, kind, layout):
    """[step, (loss, gradient norm)] by the page's functions and Megatron's optimizer."""
    names = {}
    for block in python_of(PAGE)["Megatron-Core"]:
        exec(compile(block, PAGE, "exec"), names)
    names |= {"KIND": kind, "VOCAB_SIZE": VOCAB}
    config = make_config(folder, layout)
    parallel = groups.initialize(config.model, accelerator="cpu", timeout_s=60)
    chunks = {}
    for name in ("student", "teacher"):
        hf_dir = f"{folder}/{name}"
        chunks[name] = build_chunks(
            load_hf_config(hf_dir),
            config.model,
            parallel,
            precision=config.trainer.compute_precision,
        )
        load_hf_weights(chunks[name], hf_dir, parallel)
    student = build_student(chunks["student"], config, parallel)
    results = []
    for step in range(STEPS):
        student.zero_grad()
        batches = batches_of(step, layout[3], parallel.dp_rank, parallel.dp_size)
        reports = names["forward_backward"](student.ddp_chunks, chunks["teacher"], batches)
        total = torch.zeros(2)
        if parallel.is_last_stage and parallel.tp_rank == 0:
            total = torch.stack([report["loss"] for report in reports]).sum(0)
        torch.distributed.all_reduce(total)
        assert total[1] == N
        student.set_learning_rate(LR)
        results.append((float(total[0] / total[1]), student.update()))
    return results


@cache
def dense(folder, kind):
    """The same steps with transformers in float64, one response at a time."""
    return torch.tensor(reference_steps(folder, kind, torch.float64)[0])


@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_of_the_page_equal_dense_float64_at_every_layout(models, name):
    kind, layout = LAYOUTS[name]
    for losses in run_ranks(layout[2], train, str(models), kind, layout):
        assert_same_steps(losses, dense(models, kind))
