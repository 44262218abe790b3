"""Losses whose vocabulary is split over ranks: against dense float64, what they send, faults."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_paced.losses import divergence as divergence_module
from nemo_paced.losses import linear_divergence as linear_module
from nemo_paced.losses.divergence import divergence
from nemo_paced.losses.kinds import Divergence, DivergenceKind
from nemo_paced.losses.linear_divergence import HiddenTeacher, linear_divergence, linear_loss
from nemo_paced.losses.options import Options
from nemo_paced.losses.topk import TopKTeacher, topk_divergence
from nemo_paced.losses.vocab_parallel import LOG_ZERO, target_log_probs, valid_columns
from tests.dense import KINDS, dense_divergence, make_logits
from tests.distributed.harness import run_ranks

CASES = ("random", "peaked", "equal", "tied", "offset", "bf16")
TOKENS, WIDTH, VOCAB = 11, 48, 41  # 7 padded columns, so that the last of 4 ranks has few
TEMPERATURE, H, K = 0.8, 6, 5
# peaked: losses of hundreds of nats from logits that float32 resolves to 1e-5
TOLERANCE = {"bf16": 5e-3, "peaked": 3e-5}
WEIGHTS = torch.arange(TOKENS) / TOKENS
OPTIONS = {"vocab_size": VOCAB, "temperature": TEMPERATURE}


def join():
    torch.distributed.init_process_group("gloo")
    return torch.distributed.group.WORLD


def own_columns(rank, world_size):
    share = WIDTH // world_size
    return slice(rank * share, (rank + 1) * share)


def heads():
    """Student hidden [N, h], student head [V, h], teacher hidden and head."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(n, H, generator=generator) for n in (TOKENS, WIDTH, TOKENS, WIDTH)]


def split_divergence(columns, group, case, kind, chunk_size=4):
    student, teacher = make_logits(case, TOKENS, WIDTH)
    student = student[:, columns].clone().requires_grad_()
    loss = divergence(
        student,
        teacher[:, columns],
        Divergence(kind, temperature=TEMPERATURE),
        tp_group=group,
        chunk_size=chunk_size,
        vocab_size=VOCAB,
    )
    (loss * WEIGHTS).sum().backward()
    return loss.detach(), student.grad


def split_linear(columns, group, kind):
    hidden, head, teacher_hidden, teacher_head = heads()
    hidden.requires_grad_()
    head = head[columns].clone().requires_grad_()
    loss, per_token = linear_divergence(
        hidden,
        head,
        teacher_hidden,
        teacher_head[columns],
        Divergence(kind, temperature=TEMPERATURE),
        WEIGHTS,
        tp_group=group,
        chunk_size=4,
        return_per_token=True,
        vocab_size=VOCAB,
    )
    (loss * 2).backward()
    return loss.detach(), per_token, hidden.grad, head.grad


def split_linear_targets(columns, group, temperature):
    """Log-probabilities of targets that the fused loss reports."""
    hidden, head, teacher_hidden, teacher_head = heads()
    widths = (len(head[columns]),) * 2
    return linear_loss(
        hidden,
        head[columns],
        HiddenTeacher(teacher_hidden, teacher_head[columns]),
        WEIGHTS,
        Options.of(
            Divergence("forward_kl", temperature=temperature),
            widths,
            tp_group=group,
            vocab_size=VOCAB,
        ),
        chunk_size=4,
        targets_N=torch.arange(TOKENS) * 3,
    ).target_log_probs_N


def split_topk(columns, group, kind):
    student, teacher = make_logits("random", TOKENS, WIDTH)
    top = TopKTeacher.from_logits(teacher[:, columns], K, tp_group=group, **OPTIONS)
    student = student[:, columns].clone().requires_grad_()
    loss = topk_divergence(
        student, top, Divergence(kind, temperature=TEMPERATURE), tp_group=group, vocab_size=VOCAB
    )
    (loss * WEIGHTS).sum().backward()
    return loss.detach(), student.grad, top.log_probs, top.ids, top.tail_log_prob


def _split_losses(rank, world_size):
    group, columns = join(), own_columns(rank, world_size)
    student, _ = make_logits("random", TOKENS, WIDTH)
    targets = torch.arange(TOKENS) * 3
    valid = valid_columns(WIDTH // world_size, VOCAB, group)
    return {
        "divergence": {
            (case, kind): split_divergence(columns, group, case, kind)
            for case in CASES
            for kind in KINDS
        },
        "linear": {kind: split_linear(columns, group, kind) for kind in KINDS},
        "topk": {kind: split_topk(columns, group, kind) for kind in KINDS},
        "target": target_log_probs(student[:, columns], targets, valid, group),
        "linear target": {t: split_linear_targets(columns, group, t) for t in (1.0, TEMPERATURE)},
    }


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    return run_ranks(request.param, _split_losses)


def dense_value_and_gradient(case, kind):
    student, teacher = make_logits(case, TOKENS, WIDTH)
    student = student.double().requires_grad_()
    loss = dense_divergence(student[:, :VOCAB], teacher[:, :VOCAB], kind, temperature=TEMPERATURE)
    (loss * WEIGHTS.double()).sum().backward()
    return loss.detach(), student.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_split_vocabulary_matches_dense_float64(ranks, case, kind):
    expected, expected_grad = dense_value_and_gradient(case, kind)
    tolerance = TOLERANCE.get(case, 2e-6)
    for result in ranks:
        loss, _ = result["divergence"][case, kind]
        torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    grad = torch.cat([result["divergence"][case, kind][1] for result in ranks], 1)
    bound = tolerance * max(1.0, float(expected_grad.abs().max()))
    torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=bound)


def dense_linear(kind):
    hidden, head, teacher_hidden, teacher_head = (x.double() for x in heads())
    hidden.requires_grad_()
    head.requires_grad_()
    per_token = dense_divergence(
        (hidden @ head.t())[:, :VOCAB],
        (teacher_hidden @ teacher_head.t())[:, :VOCAB],
        kind,
        temperature=TEMPERATURE,
    )
    loss = (per_token * WEIGHTS.double()).sum()
    (loss * 2).backward()
    return loss.detach(), per_token.detach(), hidden.grad, head.grad


def linear_error(results, kind):
    """Largest error of loss, tokens' losses and both gradients, in units of max(1, value)."""
    expected = dense_linear(kind)
    head_grad = torch.cat([result[3] for result in results])
    return max(
        float((actual - wanted).abs().max() / wanted.abs().max().clamp_min(1))
        for loss, per_token, hidden_grad, _ in results
        for actual, wanted in zip((loss, per_token, hidden_grad, head_grad), expected, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_split_lm_heads_match_dense_float64(ranks, kind):
    assert linear_error([result["linear"][kind] for result in ranks], kind) < 3e-6


@pytest.mark.parametrize("kind", KINDS)
def test_split_top_k_is_that_of_the_whole_vocabulary(ranks, kind):
    loss, grad, *top = split_topk(slice(None), None, kind)
    for result in ranks:
        actual_loss, _, *actual_top = result["topk"][kind]
        torch.testing.assert_close(actual_loss, loss, rtol=2e-6, atol=2e-6)
        for actual, expected in zip(actual_top, top, strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)
    actual = torch.cat([result["topk"][kind][1] for result in ranks], 1)
    torch.testing.assert_close(actual, grad, rtol=0, atol=2e-6)


def test_split_target_log_probs_match_dense(ranks):
    student, _ = make_logits("random", TOKENS, WIDTH)
    targets = torch.arange(TOKENS) * 3
    expected = torch.log_softmax(student[:, :VOCAB].double(), -1).gather(1, targets[:, None])[:, 0]
    for result in ranks:
        torch.testing.assert_close(result["target"].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, TEMPERATURE])
def test_the_fused_loss_reports_log_probs_of_targets_at_temperature_1(ranks, temperature):
    hidden, head, _, _ = (x.double() for x in heads())
    targets = torch.arange(TOKENS) * 3
    expected = (hidden @ head.t())[:, :VOCAB].log_softmax(1).gather(1, targets[:, None])[:, 0]
    for result in ranks:
        found = result["linear target"][temperature]
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=2e-6)


class Sent(TorchDispatchMode):
    """Counts collectives, and the numbers that this rank puts into them."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.numbers = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._opname.strip("_")
            self.calls[name] += 1
            given = args[1] if "allgather" in name else args[0][0]
            self.numbers[name] += given.numel()
        return func(*args, **(kwargs or {}))


def _count_collectives(rank, world_size):
    group, columns = join(), own_columns(rank, world_size)
    counts = {}
    for kind in KINDS:
        for case in ("random", "equal", "peaked"):
            student, teacher = (x[:, columns] for x in make_logits(case, TOKENS, WIDTH))
            student = student.clone().requires_grad_()
            with Sent() as forward:
                # three row blocks: still one collective a call
                loss = divergence(
                    student, teacher, kind, tp_group=group, chunk_size=4, vocab_size=VOCAB
                )
            with Sent() as backward:
                loss.sum().backward()
            counts[kind, case] = forward.calls, forward.numbers, backward.calls
        with Sent() as both:
            split_linear(columns, group, kind)
        counts[kind, "linear"] = both.calls
    return counts


def test_collectives_are_few_and_none_are_in_backward():
    for counts in run_ranks(2, _count_collectives):
        gather, reduce = "allgather_base", "allreduce"
        for kind in KINDS:
            calls, numbers, backward = counts[kind, "random"]
            assert not backward
            assert calls == counts[kind, "equal"][0] == counts[kind, "peaked"][0]
            chosen = Divergence.of(kind)
            if kind == "adaptive_kl":
                assert calls == {gather: 2, reduce: 4}
            elif chosen.is_mixture:
                assert calls == {gather: 1, reduce: 1}
                assert numbers == {gather: 4 * TOKENS, reduce: 2 * TOKENS}
            else:
                count = 4 + chosen.needs_forward_kl + chosen.needs_reverse_kl
                assert calls == {gather: 1} and numbers == {gather: count * TOKENS}
            parts = 6  # of three chunks
            expected = Counter({name: parts * n for name, n in calls.items()})
            # and one for the gradient of the hidden states
            assert counts[kind, "linear"] == expected + Counter({reduce: 1})


def plant(fault, world_size):
    """Break the losses of this process in a way that leaves curves looking normal."""
    if fault == "a missing exchange":

        def own_alone(packed, group):
            gathered = torch.zeros(world_size, *packed.shape)
            gathered[:, [0, 2]] = LOG_ZERO
            gathered[group.rank()] = packed
            return Done(gathered)

        divergence_module.begin_all_gather = own_alone
    if fault == "maxima not shared":
        gather = divergence_module.begin_all_gather

        def own_maxima(packed, group):
            gathered = gather(packed, group).wait()
            gathered[:, [0, 2]] = packed[[0, 2]]
            return Done(gathered)

        divergence_module.begin_all_gather = own_maxima
    if fault == "hidden gradient not reduced":
        linear_module.sum_gradient = lambda hidden, group: hidden
    if fault == "hidden gradient counted TP times":
        reduce = linear_module.sum_gradient
        linear_module.sum_gradient = lambda hidden, group: reduce(reduce(hidden, group), group)
    if fault == "wrong direction":
        loss = linear_module.linear_loss
        forward, reverse = DivergenceKind.forward_kl, DivergenceKind.reverse_kl

        def of_the_other(hidden, weight, teacher, token_weights, options, **others):
            own = options.divergence
            other = replace(own, kind=reverse if own.kind is forward else forward)
            options = replace(options, divergence=other)
            return loss(hidden, weight, teacher, token_weights, options, **others)

        linear_module.linear_loss = of_the_other
    if fault == "logits gradient counted TP times":
        run = linear_module.HiddenTeacher.solve

        def counted_twice(self, student, rows, options):
            answer = yield from run(self, student, rows, options)
            return replace(
                answer, write_gradient=lambda scale: answer.write_gradient(scale * world_size)
            )

        linear_module.HiddenTeacher.solve = counted_twice


class Done:
    def __init__(self, result):
        self.result = result

    def wait(self):
        return self.result


def _split_linear_with(rank, world_size, fault):
    group, columns = join(), own_columns(rank, world_size)
    plant(fault, world_size)
    return {kind: split_linear(columns, group, kind) for kind in ("forward_kl", "reverse_kl")}


FAULTS = (
    "a missing exchange",
    "maxima not shared",
    "hidden gradient not reduced",
    "hidden gradient counted TP times",
    "logits gradient counted TP times",
    "wrong direction",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_with_dense_notices(fault):
    results = run_ranks(2, _split_linear_with, fault)
    for kind in ("forward_kl", "reverse_kl"):
        assert linear_error([result[kind] for result in results], kind) > 1e-3
