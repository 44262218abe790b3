"""Runs the Triton kernels in Triton's interpreter, for ``test_triton_kernels.py``.

A process of its own, because Triton reads ``TRITON_INTERPRET`` when it is first imported and torch
or Megatron may have imported it long before a test begins. Writes what it computed to the file
named on the command line.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from nemo_paced.losses import divergence as divergence_module
from nemo_paced.losses.divergence import finish, solve
from nemo_paced.losses.options import Options
from tests.dense import KINDS, make_logits, of_kind

ROWS, WIDTH = 2, 40
# tiles of 16 columns in float32 and of 32 else; WIDTH is no multiple: the last tile is part full
WARP, NUM_WARPS = 2, 2
JSD_BETA = 0.3
INF = float("inf")

# widths around a tile, as cases (width, dtype)
EDGES = (
    *((width, torch.float32) for width in (1, 7, 8, 15, 16, 17, 53)),
    *((width, dtype) for dtype in (torch.bfloat16, torch.float16) for width in (7, 32, 101)),
)


def edge_inputs(width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Logits in rows that lie further apart than they are wide, the teacher's far above."""
    student, teacher = (
        widen(z, 3, 50.0).to(dtype)[:, :-3] for z in make_logits("random", ROWS, width)
    )
    teacher += 47.0
    if width > 8:  # no mass in a row's first loads, nor in its last column
        student[0, :8], teacher[0, :8] = -INF, -INF
        student[1, -1], teacher[1, -1] = -INF, -INF
    return student, teacher, {"temperature": 1.3}


def inputs(case: str | tuple) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Student and teacher logits and the options of a case: a name, or one of ``EDGES``."""
    if isinstance(case, tuple):
        return edge_inputs(*case)
    made = case if case in ("peaked", "equal", "tied", "bf16") else "random"
    student, teacher = make_logits(made, ROWS, WIDTH)
    options = {"temperature": 0.7} if case in ("cooler", "padded", "rising") else {}
    if case == "nearly_equal":
        teacher = student + 1e-3 * teacher
    if case in (
        "on_grid",
        "offset",
        "apart",
    ):  # logits that float32 represents together with the offset
        student, teacher = (student * 64).round() / 64, (teacher * 64).round() / 64
    if case == "offset":
        student, teacher = student + 1e4, teacher + 1e4
    if case == "apart":
        student, teacher = student + 1e4, teacher - 1e4
    if case == "rising":  # the maximum moves with every tile, the teacher's and the student's apart
        student = student + torch.linspace(0, 12, WIDTH)
        teacher = teacher + torch.linspace(0, 30, WIDTH)
    if case == "not_a_number":
        student[1, 20] = float("nan")
    if case == "no_rows":
        student, teacher = student[:0], teacher[:0]
    if case == "mixed":
        student = student.bfloat16()
    if case == "half":
        student, teacher = student.half(), teacher.half()
    if case == "no_mass_first":  # more than a tile of -inf before the first finite logit
        student[:, :20], teacher[:, :20] = -INF, -INF
    if case == "no_mass_last":
        student[:, 20:], teacher[:, 20:] = -INF, -INF
    if case == "padded":  # widths that differ, rows that lie further apart than they are wide
        student, teacher = widen(student, 8, 50.0)[:, :-1], widen(teacher, 24, -INF)
        options["vocab_size"] = WIDTH
    if case == "columns_first":
        student, teacher = student.T.contiguous().T, teacher.T.contiguous().T
    return student, teacher, options


CASES = (
    *("random", "peaked", "equal", "nearly_equal", "tied", "bf16", "half", "cooler", "rising"),
    *(
        "on_grid",
        "offset",
        "apart",
        "mixed",
        "no_mass_first",
        "no_mass_last",
        "padded",
        "columns_first",
    ),
    *("not_a_number", "no_rows"),
)

# whose border has ties on both ranks, and has none
SPLIT_CASES = ("tied", "equal", "random", "bf16")


def widen(logits_NV: torch.Tensor, columns: int, padding: float) -> torch.Tensor:
    return torch.cat([logits_NV, torch.full((len(logits_NV), columns), padding)], 1)


def weights(rows: int = ROWS) -> torch.Tensor:
    return torch.tensor([0.3, 1.7])[:rows]


def options_of(kind: str) -> Options:
    divergence, _ = of_kind(kind, {"jsd_beta": JSD_BETA})
    return Options.of(divergence, (WIDTH, WIDTH), tp_group=None, vocab_size=None)


def value_and_gradient(kind: str, case: str | tuple) -> tuple[torch.Tensor, torch.Tensor | None]:
    student, teacher, options = inputs(case)
    student = student.detach().requires_grad_()
    divergence, others = of_kind(kind, {"jsd_beta": JSD_BETA, **options})
    loss = divergence_module.divergence(student, teacher, divergence, **others)
    (loss * weights(len(loss))).sum().backward()
    return loss.detach(), student.grad


def gradient_in_place(kernels: ModuleType, kind: str) -> torch.Tensor:
    student, teacher, _ = inputs("random")
    options = options_of(kind)
    numbers = finish(solve(student, teacher, options)).numbers
    kernels.gradient(student, teacher, numbers, weights(), options, student)
    return student


def shard_statistics(kernels: ModuleType, kind: str) -> torch.Tensor:
    """What the ranks of a group gather whose second holds no mass and whose third no column."""
    student, teacher, _ = inputs("random")
    nothing = torch.full_like(student, -INF)
    options = options_of(kind)
    return torch.stack(
        [
            kernels.local_stats(student, teacher, options),
            kernels.local_stats(nothing, nothing, options),
            kernels.local_stats(student, teacher, replace(options, valid=0)),
        ]
    )


def shard_without_columns(kernels: ModuleType, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixture sums and gradient of a rank whose columns are all padding."""
    student, teacher, _ = inputs("random")
    options = options_of(kind)
    numbers = finish(solve(student, teacher, options)).numbers
    options = replace(options, valid=0)
    sums, grad = torch.zeros(2, ROWS), torch.full_like(student, 7.0)
    if options.divergence.is_mixture:
        sums = kernels.mixture_sums(student, teacher, numbers, options)
    kernels.gradient(student, teacher, numbers, weights(), options, grad)
    return sums, grad


def split_adaptive_kl(rank: int, folder: str) -> None:
    """Loss and gradient of this rank's half of the columns, to a file of its own."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    columns = slice(rank * WIDTH // 2, (rank + 1) * WIDTH // 2)
    results = {}
    for case in SPLIT_CASES:
        student, teacher = (logits_NV[:, columns] for logits_NV in inputs(case)[:2])
        student = student.clone().requires_grad_()
        group = torch.distributed.group.WORLD
        loss = divergence_module.divergence(student, teacher, "adaptive_kl", tp_group=group)
        (loss * weights()).sum().backward()
        results[case] = loss.detach(), student.grad
    torch.save(results, f"{folder}/{rank}")


def on_two_ranks() -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """What :func:`split_adaptive_kl` gives on each rank."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            multiprocessing.get_context("fork").Process(target=split_adaptive_kl, args=(r, folder))
            for r in range(2)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        return [torch.load(f"{folder}/{rank}") for rank in range(2)]


def main(path: str) -> None:
    from nemo_paced.losses import triton_adaptive_kl, triton_kernels

    triton_kernels.WARP, triton_kernels.NUM_WARPS = WARP, NUM_WARPS
    divergence_module.kernels_for = lambda logits: triton_kernels
    divergence_module.adaptive_kl_for = lambda logits: triton_adaptive_kl
    results: dict[Any, Any] = {
        (kind, case): value_and_gradient(kind, case) for kind in KINDS for case in (*CASES, *EDGES)
    }
    for kind in KINDS:
        results[kind, "in_place"] = gradient_in_place(triton_kernels, kind)
        results[kind, "shards"] = shard_statistics(triton_kernels, kind)
        results[kind, "no_columns"] = shard_without_columns(triton_kernels, kind)
    results["two_ranks"] = on_two_ranks()
    torch.save(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
