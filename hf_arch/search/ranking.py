"""Which documents are near a query: measures of a search, and the wrong documents that it is taken in by."""

from collections.abc import Iterator, Sequence

import torch

ROWS = 1024  # queries whose scores are made at once
Places = torch.Tensor | Sequence[int] | None


def scored(queries: torch.Tensor, documents: torch.Tensor, own: Places) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of some queries at a time, the scores of all documents [rows, documents], and those of their own [rows, 1]."""
    own = torch.arange(len(queries)) if own is None else torch.as_tensor(own)
    if queries.shape[1:] != documents.shape[1:] or len(own) != len(queries):
        raise ValueError(
            f"There are queries {list(queries.shape)}, documents {list(documents.shape)} and {len(own)} places of "
            "their own: give vectors of one size, and a place for each query."
        )
    if len(own) and int(own.max()) >= len(documents):
        raise ValueError(f"Query {int(own.argmax())} has no document: there are {len(documents)}. Say which, by `own`.")
    for some, places in zip(queries.split(ROWS), own.to(queries.device).split(ROWS), strict=True):
        scores = some @ documents.T
        yield scores, scores.gather(1, places[:, None])


def ranks(queries: torch.Tensor, documents: torch.Tensor, own: Places = None) -> torch.Tensor:
    """The place, from 1, of each query's own document among all, the nearest first: [queries].

    queries [queries, size], documents [documents, size]; own [queries]: the number of each query's document, by default
    that in the same place. What is as near counts as nearer: vectors that are all the same find nothing.
    """
    found = [(scores >= right).sum(dim=1) for scores, right in scored(queries, documents, own)]
    return torch.cat(found)


def recall_at(queries: torch.Tensor, documents: torch.Tensor, k: int = 1, own: Places = None) -> float:
    """The share of queries whose own document is among the k nearest; arguments as of `ranks`."""
    return float((ranks(queries, documents, own) <= k).float().mean())


def mean_reciprocal_rank(queries: torch.Tensor, documents: torch.Tensor, own: Places = None) -> float:
    """The mean of 1 / rank, which is 1 where each query finds its own document first; arguments as of `ranks`."""
    return float((1 / ranks(queries, documents, own)).mean())


def hard_negatives(
    queries: torch.Tensor,
    documents: torch.Tensor,
    own: Places = None,
    count: int = 1,
    margin: float = 0.05,
) -> torch.Tensor:
    """Of each query the numbers of the `count` documents that are nearest and yet wrong, the nearest first: [queries,
    count].

    Vectors may be of the model that is trained (Xiong et al., 2020, arXiv:2007.00808), of another, or TF-IDF. What
    scores no less than (1 - margin) times what a query's own document does may be right as well, and is left out
    (Moreira et al., 2024, arXiv:2407.15831, TopK-PercPos); where too few others are left, those that score least of it
    fill up. Other arguments as of `ranks`. Example:

        found = hf_arch.hard_negatives(queries, passages, count=2)
        triplets = [pair | {"negative": [texts[i] for i in of_pair]} for pair, of_pair in zip(pairs, found.tolist())]
    """
    if not 0 < count < len(documents):
        raise ValueError(
            f"count is {count}; of {len(documents)} documents one is right: ask for 1 or more of the others."
        )
    if margin < 0:
        raise ValueError(f"margin is {margin}: below 0 a query's own document would be a negative.")
    own = torch.arange(len(queries)) if own is None else torch.as_tensor(own)
    found = []
    for rows, (scores, right) in zip(own.to(queries.device).split(ROWS), scored(queries, documents, own), strict=True):
        near = scores >= right - margin * right.abs()
        lowest = scores.min()
        order = torch.where(
            near, 2 * lowest - scores - 1, scores
        )  # what is left out comes last, its nearest at the end
        order.scatter_(1, rows[:, None], -torch.inf)
        found.append(order.topk(count).indices)
    return torch.cat(found)
