import pytest
import torch

from nemo_paced.data.loader import ProblemOrder, occurrences
from nemo_paced.data.packing import (
    TrainItem,
    micro_batches,
    num_micro_batches,
    padded_length,
    rank_items,
)
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


@pytest.mark.parametrize("teacher", [False, True])
def test_token_t_is_predicted_from_the_position_before_it(teacher):
    length = padded_length(ITEMS, teacher=teacher, multiple_of=8)
    batches = micro_batches(
        ITEMS,
        teacher=teacher,
        micro_batch_size=2,
        count=2,
        sequence_length=length,
        device=torch.device("cpu"),
    )
    assert all(batch.tokens_BS.shape == (2, 8) for batch in batches)
    found = {}
    for batch in batches:
        offset = 0
        for name, count in batch.spans:
            part = slice(offset, offset + count)
            rows, positions = batch.rows_N[part], batch.positions_N[part]
            found[name] = batch.tokens_BS[rows, positions + 1].tolist()
            assert batch.targets_N[part].tolist() == found[name]
            prompt = batch.tokens_BS[rows[0], : positions[0] + 1].tolist()
            wanted = next(i for i in ITEMS if i.response_id == name)
            assert tuple(prompt) == (
                wanted.teacher_prompt_ids if teacher else wanted.student_prompt_ids
            )
            assert (batch.token_weights_N[part] == wanted.token_weight).all()
            offset += count
        assert offset == batch.num_tokens
    assert found == {i.response_id: list(i.response_ids) for i in ITEMS}


def test_ranks_share_the_items_and_agree_on_the_number_of_micro_batches():
    parts = [rank_items(ITEMS, dp_rank=rank, dp_size=2) for rank in range(2)]
    assert sorted(i.response_id for part in parts for i in part) == ["a", "b", "c"]
    count = num_micro_batches(-(-len(ITEMS) // 2), micro_batch_size=1)
    assert count == 2 == max(map(len, parts))
    assert num_micro_batches(0, micro_batch_size=4) == 1


def test_reductions_divide_once_by_a_global_number():
    how = {"response_length": 5, "num_problems": 8, "total_tokens": 40}
    assert token_weight("token_sum", weight=2.0, **how) == 2 / 8
    assert token_weight("sequence_mean", weight=2.0, **how) == 2 / (8 * 5)
    assert token_weight("token_mean", weight=2.0, **how) == 2 / 40
    with pytest.raises(ValueError, match="choose token_sum"):
        token_weight("mean", weight=1.0, **how)
