"""Group ids from sampling on: the host has none, it finds groups again by their prompt tokens.

Two prompts of the data set may have the same tokens; their completions are then two groups that
the host would merge. Here every sample carries the index of its prompt in the data set.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from nemo_apo.aligner.columns import GROUP_ID


class IndexedDataset:
    """A data set whose items come with their index."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]


def with_group_ids(batch_iterator_cls: Callable[..., Any]) -> Callable[..., Any]:
    """The host's batch iterator, whose batches carry ``GROUP_ID`` [b] int64."""

    def build(*, dataset: Any, collate_fn: Callable[..., Mapping[str, Any]], **rest: Any) -> Any:
        def collate(items: list[tuple[int, Any]]) -> dict[str, Any]:
            indices = [int(index) for index, _ in items]
            batch = dict(collate_fn([item for _, item in items]))
            batch[GROUP_ID] = torch.tensor(indices, dtype=torch.int64)
            return batch

        return batch_iterator_cls(dataset=IndexedDataset(dataset), collate_fn=collate, **rest)

    return build
