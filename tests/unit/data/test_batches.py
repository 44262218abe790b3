from dataclasses import replace

import pytest
import torch

from nemo_paced.data.loader import ProblemOrder, occurrences
from nemo_paced.data.packing import Cut, TrainItem, cut_batch, held_columns, pack
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

    def __init__(self, dp=(0, 1), cp=(0, 1), tp_size=1):
        self.dp_rank, self.dp_size = dp
        self.cp_rank, self.cp_size = cp
        self.tp_size = tp_size


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
        assert batch.tokens_BS.shape == batches[0].tokens_BS.shape
        assert batch.tokens_BS.shape[1] % 8 == 0
        assert not batch.sequences or sum(batch.sequences) == batch.tokens_BS.shape[1]
        found |= responses_of(batch, teacher=teacher)
    assert found == {i.response_id: list(i.response_ids) for i in ITEMS}


@pytest.mark.parametrize("cut", [Cut(1), Cut(1, packed_sequence_size=16)])
def test_data_parallel_ranks_share_the_items_and_agree_on_every_shape(cut):
    ranks = [
        cut_batch(ITEMS, replace(cut, micro_batches_multiple_of=4), Ranks((r, 2)), teacher=False)
        for r in range(2)
    ]
    assert [len(batches) for batches in ranks] == [4, 4]
    assert len({batch.tokens_BS.shape for batches in ranks for batch in batches}) == 1
    names = [name for batches in ranks for batch in batches for name, _ in batch.spans]
    assert sorted(names) == ["a", "b", "c"]
    assert len(cut_batch([], cut, Ranks(), teacher=False)) == 1


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


def test_packing_fills_rows_and_names_what_fits_in_none():
    lengths = [5, 3, 8, 2, 6, 4]
    items = [item(f"{n}", (1,), (1,), (2,) * (n - 1)) for n in lengths]
    rows = pack(items, lambda i: 1 + len(i.response_ids), 10)
    sums = [sum(1 + len(i.response_ids) for i in row) for row in rows]
    assert sums == [10, 10, 8], "first fit, longest first: 8 + 2, 6 + 4, 5 + 3"
    with pytest.raises(ConfigError, match=r"problem '8' has 8 tokens of .*packed_sequence_size 7"):
        pack(items, lambda i: 1 + len(i.response_ids), 7)


def test_reductions_divide_once_by_a_global_number():
    how = {"response_length": 5, "num_problems": 8, "total_tokens": 40}
    assert token_weight("token_sum", weight=2.0, **how) == 2 / 8
    assert token_weight("sequence_mean", weight=2.0, **how) == 2 / (8 * 5)
    assert token_weight("token_mean", weight=2.0, **how) == 2 / 40
    with pytest.raises(ValueError, match="choose token_sum"):
        token_weight("mean", weight=1.0, **how)
