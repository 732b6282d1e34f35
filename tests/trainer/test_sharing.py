"""A rank's part of a batch: which rows and columns it computes, and what comes back where."""

import pytest
import torch

from nemo_apo.parallel.layout import Layout
from nemo_apo.trainer.micro_batch import MicroBatch
from nemo_apo.trainer.sharing import share_of

CPU = torch.device("cpu")
LENGTHS = [3, 9, 1, 6, 9, 2]
WIDTH = 12


def layout(data_size: int = 1, data_rank: int = 0, pipeline_size: int = 1) -> Layout:
    world = data_size * pipeline_size
    return Layout(CPU, 0, world, 1, pipeline_size, data_size, 0, 0, data_rank)


def batch() -> MicroBatch:
    """Rows of the lengths above, two prompt columns first; ids tell row and column."""
    tokens = torch.arange(len(LENGTHS) * (WIDTH + 1)).view(len(LENGTHS), -1)
    columns = torch.arange(WIDTH)
    ends = torch.tensor(LENGTHS)[:, None]
    return MicroBatch.of(tokens, (columns >= 2) & (columns < 2 + ends))


def rows_of(share) -> list[list[int]]:
    """Which rows of the batch each micro-batch holds."""
    return [(part.inputs_BT[:, 0] // (WIDTH + 1)).tolist() for part in share.micro_batches]


def test_rows_of_like_length_go_together_and_end_with_the_longest() -> None:
    share = share_of(batch(), 2, layout(), 1)
    assert rows_of(share) == [[1, 4], [3, 0], [5, 2]]
    assert [part.width for part in share.micro_batches] == [11, 8, 4]


def test_pipeline_stages_exchange_equal_shapes() -> None:
    share = share_of(batch(), 2, layout(pipeline_size=2), 1)
    assert [part.width for part in share.micro_batches] == [11, 11, 11]


@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_a_width_is_a_multiple(multiple: int) -> None:
    share = share_of(batch(), 3, layout(), multiple)
    for part in share.micro_batches:
        assert part.width % multiple == 0
        assert not part.mask_BT[:, WIDTH:].any()


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_no_completion_token_is_lost_or_counted_twice(size: int) -> None:
    whole = batch()
    seen = [
        token
        for rank in (0, 1)
        for part in share_of(whole, size, layout(2, rank), 1).micro_batches
        for token in part.targets_BT[part.mask_BT].tolist()
    ]
    assert sorted(seen) == sorted(whole.targets_BT[whole.mask_BT].tolist())


def test_rows_that_fill_up_carry_no_token_and_ranks_have_equally_many() -> None:
    shares = [share_of(batch(), 2, layout(4, rank), 1) for rank in range(4)]
    assert [len(share.micro_batches) for share in shares] == [1, 1, 1, 1]
    real = [int(share.micro_batches[0].mask_BT.any(dim=1).sum()) for share in shares]
    assert real == [2, 2, 2, 0]
    assert shares[3].micro_batches[0].width == 1


def test_values_come_back_in_row_order() -> None:
    share = share_of(batch(), 4, layout(), 1)
    first = torch.cat([part.inputs_BT[:, 0] for part in share.micro_batches])
    assert share.in_row_order(first)[: len(LENGTHS)].tolist() == batch().inputs_BT[:, 0].tolist()
