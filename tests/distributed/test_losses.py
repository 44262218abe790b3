import pytest
import torch

from nemo_paced.losses.divergence import divergence
from nemo_paced.losses.vocab_parallel import target_log_probs
from tests.dense import KINDS, dense_divergence, make_logits
from tests.distributed.harness import run_ranks

CASES = ("random", "peaked", "equal", "tied", "offset", "bf16")
TOKENS, WIDTH, VOCAB = 11, 48, 41  # 7 padded columns, so that the last of 4 ranks has few


def _split_losses(rank, world_size):
    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    share = WIDTH // world_size
    columns = slice(rank * share, (rank + 1) * share)
    weights = torch.arange(TOKENS) / TOKENS
    results = {}
    for case in CASES:
        full_student, teacher = make_logits(case, TOKENS, WIDTH)
        for kind in KINDS:
            student = full_student[:, columns].clone().requires_grad_()
            loss = divergence(
                student,
                teacher[:, columns],
                kind,
                tp_group=group,
                vocab_size=VOCAB,
                temperature=0.8,
                chunk_size=4,
            )
            (loss * weights).sum().backward()
            results[case, kind] = (loss.detach(), student.grad)
    targets = torch.arange(TOKENS) * 3
    student, _ = make_logits("random", TOKENS, WIDTH)
    logprobs = target_log_probs(student[:, columns], targets, tp_group=group, vocab_size=VOCAB)
    return results, logprobs


@pytest.mark.parametrize("world_size", [2, 4])
def test_split_vocabulary_matches_dense_float64(world_size):
    ranks = run_ranks(world_size, _split_losses)
    weights = torch.arange(TOKENS).double() / TOKENS
    for case in CASES:
        full_student, teacher = make_logits(case, TOKENS, WIDTH)
        for kind in KINDS:
            student = full_student.double().requires_grad_()
            expected = dense_divergence(
                student[:, :VOCAB], teacher[:, :VOCAB], kind, temperature=0.8
            )
            (expected * weights).sum().backward()
            grad = torch.cat([results[case, kind][1] for results, _ in ranks], 1)
            # peaked: losses of hundreds of nats from logits that float32 resolves to 1e-5
            tolerance = {"bf16": 5e-3, "peaked": 3e-5}.get(case, 2e-6)
            scale = max(1.0, float(student.grad.abs().max()))
            told = f"{case} {kind}"
            for results, _ in ranks:
                loss = results[case, kind][0].double()
                assert torch.allclose(loss, expected, rtol=tolerance, atol=tolerance), told
            error = (grad.double() - student.grad).abs().max()
            assert error <= tolerance * scale, told


def test_split_target_log_probs_match_dense():
    student, _ = make_logits("random", TOKENS, WIDTH)
    targets = torch.arange(TOKENS) * 3
    expected = torch.log_softmax(student[:, :VOCAB].double(), -1).gather(1, targets[:, None])[:, 0]
    for _, logprobs in run_ranks(2, _split_losses):
        torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=1e-6)
