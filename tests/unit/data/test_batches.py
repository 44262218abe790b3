from dataclasses import replace

import pytest
import torch

from nemo_paced.data.loader import ProblemOrder, occurrences
from nemo_paced.data.packing import Cut, TrainItem, cut_batch, held_columns, pack, rank_items
from nemo_paced.errors import ConfigError
from nemo_paced.losses.reduction import token_weight


def item(name, student, teacher, response, weight=1.0):
    return TrainItem(name, name, student, teacher, response, weight)


ITEMS = [
    item("a", (1, 2), (1, 9, 9, 2), (3, 4, 5), 0.5),
    item("b", (6,), (6, 7), (8,), 2.0),
    item("c", (1, 1, 1), (1,), (2, 2), 1.0),
]


def test_every_epoch_holds_each_problem_once_and_the_order_is_a_function_of_the_position():
    order = ProblemOrder(10, seed=3)
    first, second = order.take(0, 10), order.take(10, 10)
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert order.take(0, 4) + order.take(4, 9) == order.take(0, 13), "any batch size goes on"
    assert ProblemOrder(10, seed=4).take(0, 10) != first
    assert ProblemOrder(3, seed=0, shuffle=False).take(2, 3) == [2, 0, 1]


def test_a_problem_drawn_twice_is_told_apart():
    assert occurrences(["a", "b", "a"]) == [0, 0, 1]


class Ranks:
    """Where a rank stands, without process groups."""

    device = torch.device("cpu")

    def __init__(self, dp=(0, 1), cp=(0, 1), tp_size=1, pp_size=1):
        self.dp_rank, self.dp_size = dp
        self.cp_rank, self.cp_size = cp
        self.tp_size, self.pp_size = tp_size, pp_size


def responses_of(batch, *, teacher):
    """Of each response: its tokens as they stand behind the positions that predict them."""
    found, offset = {}, 0
    for number, (name, count) in enumerate(batch.spans):
        part = slice(offset, offset + count)
        rows, positions = batch.rows_N[part], batch.positions_N[part]
        found[name] = batch.tokens_BS[rows, positions + 1].tolist()
        assert batch.targets_N[part].tolist() == found[name]
        begin = sum(batch.sequences[:number])
        prompt = tuple(batch.tokens_BS[rows[0], begin : positions[0] + 1].tolist())
        wanted = next(i for i in ITEMS if i.response_id == name)
        assert prompt == (wanted.teacher_prompt_ids if teacher else wanted.student_prompt_ids)
        assert batch.position_ids_BS[rows[0], positions[0]] == len(prompt) - 1
        assert (batch.token_weights_N[part] == wanted.token_weight).all()
        offset += count
    assert offset == batch.num_tokens
    return found


CUTS = {"padded": Cut(2), "packed": Cut(1, packed_sequence_size=8), "one row": Cut(1, 100)}


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_token_t_is_predicted_from_the_position_before_it(teacher, cut):
    batches = cut_batch(ITEMS, CUTS[cut], Ranks(), teacher=teacher)
    assert len(batches) == {"padded": 2, "packed": 2, "one row": 1}[cut]
    found = {}
    for batch in batches:
        assert batch.tokens_BS.shape[1] % 8 == 0
        assert not batch.sequences or sum(batch.sequences) == batch.tokens_BS.shape[1]
        found |= responses_of(batch, teacher=teacher)
    assert found == {i.response_id: list(i.response_ids) for i in ITEMS}


@pytest.mark.parametrize("pp_size", [1, 2])
@pytest.mark.parametrize("cut", [Cut(1), Cut(1, packed_sequence_size=16)])
def test_data_parallel_ranks_share_the_items_and_agree_on_every_shape(cut, pp_size):
    assert len(cut_batch([], cut, Ranks(), teacher=False)) == 1
    cut = replace(cut, micro_batches_multiple_of=4)
    ranks = [
        cut_batch(ITEMS, cut, Ranks((rank, 2), pp_size=pp_size), teacher=False) for rank in range(2)
    ]
    shapes = [[batch.tokens_BS.shape for batch in batches] for batches in ranks]
    assert len(shapes[0]) == 4 and shapes[0] == shapes[1]
    if pp_size > 1:
        assert len(set(shapes[0])) == 1, "stages exchange one shape"
    names = [name for batches in ranks for batch in batches for name, _ in batch.spans]
    assert sorted(names) == ["a", "b", "c"]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("cp_size", [2, 3])
def test_context_parallel_ranks_hold_every_position_once(cut, cp_size):
    whole = cut_batch(ITEMS, CUTS[cut], Ranks(tp_size=cp_size * 2), teacher=True)
    slices = [
        cut_batch(ITEMS, CUTS[cut], Ranks(cp=(rank, cp_size)), teacher=True)
        for rank in range(cp_size)
    ]
    for number, batch in enumerate(slices[0]):
        parts = [of_rank[number] for of_rank in slices]
        sequences = batch.sequences or (batch.tokens_BS.shape[1] * cp_size,)
        columns = [held_columns(sequences, cp_rank=r, cp_size=cp_size) for r in range(cp_size)]
        assert torch.cat(columns).sort().values.tolist() == list(range(sum(sequences)))
        tokens = torch.cat([part.tokens_BS for part in parts], 1)[:, torch.cat(columns).argsort()]
        local = torch.cat([part.local_N for part in parts])
        assert local.sort().values.tolist() == list(range(sum(n for _, n in batch.spans)))
        for part, own in zip(parts, columns, strict=True):
            # the token behind the predicting position, in the row put back together
            behind = tokens[part.rows_N, own[part.positions_N] + 1]
            assert torch.equal(behind, part.targets_N)
            first = part.position_ids_BS[part.rows_N, part.positions_N]
            assert (first >= 0).all()
        weights = torch.cat([part.token_weights_N for part in parts])[local.argsort()]
        assert weights.tolist() == [
            item.token_weight
            for name, n in batch.spans
            for item in ITEMS
            if item.response_id == name
            for _ in range(n)
        ]
    assert len(whole) == len(slices[0])


def of_lengths(*lengths):
    return [item(f"{n}", (1,), (1,), (2,) * (n - 1)) for n in lengths]


def length(item):
    return 1 + len(item.response_ids)


def test_packing_fills_few_rows_evenly_and_names_what_fits_in_none():
    items = of_lengths(5, 3, 8, 2, 6, 4)
    (rows,) = pack([items], length, 10)
    assert [[length(i) for i in row] for row in rows] == [[8, 2], [6, 3], [5, 4]]
    (rows,) = pack([items], length, 10, rows_multiple_of=2)
    assert [[length(i) for i in row] for row in rows] == [[8], [5, 2], [4, 3], [6]]
    (one, other) = pack([items, of_lengths(1)], length, 10)
    assert len(one) == len(other) == 3 and other[1:] == [[], []]
    (tight,) = pack([of_lengths(6, 6, 6)], length, 10)
    assert len(tight) == 3, "18 tokens would fill two rows, and no two of these fit in one"
    with pytest.raises(ConfigError, match=r"problem '8' has 8 tokens of .*packed_sequence_size 7"):
        pack([items], length, 7)


def test_each_micro_batch_is_as_long_as_its_own_longest_sequence():
    items = of_lengths(100, 9, 50, 8, 40, 99)
    widths = [b.tokens_BS.shape[1] for b in cut_batch(items, Cut(2), Ranks(), teacher=False)]
    assert widths == [104, 56, 16], "of 100 and 99, 50 and 40, 9 and 8"
    widths = [
        b.tokens_BS.shape[1] for b in cut_batch(items, Cut(2), Ranks(pp_size=2), teacher=False)
    ]
    assert widths == [104] * 3


def test_ranks_get_equally_many_items_and_alike_loads():
    items = of_lengths(1000, 400, 300, 300, *range(10, 50))
    shares = [rank_items(items, dp_rank=rank, dp_size=4) for rank in range(4)]
    assert [len(share) for share in shares] == [11] * 4
    assert sorted(i.response_id for share in shares for i in share) == sorted(
        i.response_id for i in items
    )
    loads = [sum(length(i) for i in share) for share in shares]
    assert loads == [1145, 706, 664, 665], "as even as eleven each allow"


@pytest.mark.parametrize(
    ("problems", "dp_size", "pp_size", "most"),
    [(32, 4, 1, 0.05), (64, 4, 1, 0.05), (256, 8, 1, 0.05), (256, 8, 2, 0.05), (32, 4, 2, 0.1)],
)
def test_packed_rows_of_responses_of_all_lengths_hold_hardly_any_padding(
    problems, dp_size, pp_size, most
):
    """Long-tailed lengths below a limit of 16,384 tokens, as of a reasoning model's responses."""
    generator = torch.Generator().manual_seed(0)
    ranks, cut = Ranks((0, dp_size), pp_size=pp_size), Cut(1, packed_sequence_size=18432)
    shares = []
    for _ in range(5):
        lengths = (torch.randn(problems, generator=generator) * 0.8 + 8).exp().clamp(64, 16384)
        items = of_lengths(*lengths.int().tolist())
        batches = cut_batch(items, cut, ranks, teacher=False)
        positions = dp_size * sum(batch.tokens_BS.numel() for batch in batches)
        shares.append(1 - sum(map(length, items)) / positions)
    assert sum(shares) / len(shares) < most


def test_reductions_divide_once_by_a_global_number():
    how = {"response_length": 5, "num_problems": 8, "total_tokens": 40}
    assert token_weight("token_sum", weight=2.0, **how) == 2 / 8
    assert token_weight("sequence_mean", weight=2.0, **how) == 2 / (8 * 5)
    assert token_weight("token_mean", weight=2.0, **how) == 2 / 40
    with pytest.raises(ValueError, match="choose token_sum"):
        token_weight("mean", weight=1.0, **how)
