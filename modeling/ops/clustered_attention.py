"""Attention within clusters that take the tokens nearest to them (Roy et al., 2020, arXiv:2003.05997, section 4.1).

    queries of cluster c = the `size` nearest to it        keys of c = the `size` nearest to it
    out_i = mean over the clusters that took query i of softmax(q_i k^T / sqrt(dim)) v over the keys of each

Who is taken rests on all tokens of a document, those after a token too: for encoders. A query that none took gets
zeros. Shapes: query, key, value [batch, length, heads, dim]; affinities [batch, heads, length, clusters]; documents
[batch, length] as in `documents.py`.
"""

import torch
import torch.nn.functional as F

from .documents import find_documents

NO_DIVISION_BY_ZERO = 1e-5  # added to the number of clusters, as lucidrains' routing-transformer does


def clustered_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_affinity: torch.Tensor,
    key_affinity: torch.Tensor,
    size: int,
    *,
    documents: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """[batch, length, heads, dim]."""
    if documents is not None:
        found = find_documents(documents)
        tensors = query, key, value, query_affinity.transpose(1, 2), key_affinity.transpose(1, 2)
        *tensors, of_queries, of_keys = (found.unpack(x) for x in tensors)
        rows = attend_in_clusters(
            *tensors, of_queries.transpose(1, 2), of_keys.transpose(1, 2), size, found.real, dropout
        )
        return found.repack(rows, *documents.shape)
    return attend_in_clusters(query, key, value, query_affinity, key_affinity, size, None, dropout)


def attend_in_clusters(query, key, value, query_affinity, key_affinity, size: int, real, dropout: float):
    """The same where each row is a document; `real` [batch, length], None where all tokens are."""
    asking, there = members(query_affinity, size, real)
    told, seen = members(key_affinity, size, real)
    clusters = [of_members(x, index) for x, index in ((query, asking), (key, told), (value, told))]
    mask = None if seen is None else added_mask(seen, query).flatten(0, 1)[:, :, None]
    answers = F.scaled_dot_product_attention(*clusters, mask, dropout_p=dropout).unflatten(0, asking.shape[:2])
    ones = torch.ones_like(answers[..., :1])
    answers = torch.cat((answers, ones), dim=-1)
    if there is not None:
        answers = answers * there[..., None]
    answers, index = answers.flatten(2, 3), asking.flatten(2)[..., None].expand(-1, -1, -1, answers.shape[-1])
    total = answers.new_zeros(*query_affinity.shape[:3], answers.shape[-1]).scatter_add(2, index, answers)
    return (total[..., :-1] / (total[..., -1:] + NO_DIVISION_BY_ZERO)).transpose(1, 2)


def members(affinity: torch.Tensor, size: int, real: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The `size` tokens nearest to each cluster [batch, heads, clusters, size], and whether there is one; None where
    there always is. Fewer where the rows have fewer."""
    if real is not None:
        affinity = affinity.masked_fill(~real[:, None, :, None], -torch.inf)
    index = affinity.topk(min(size, affinity.shape[2]), dim=2, sorted=False).indices.transpose(2, 3)
    if real is None:
        return index, None
    return index, real[:, None].expand(-1, index.shape[1], -1).gather(2, index.flatten(2)).view_as(index)


def added_mask(shown: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What is added to scores, 0 where a key is shown."""
    return torch.zeros(shown.shape, dtype=like.dtype, device=like.device).masked_fill_(~shown, -torch.inf)


def of_members(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [batch, length, heads, dim] -> [batch * heads, clusters, size, dim]."""
    rows, dim = x.transpose(1, 2), x.shape[-1]
    taken = rows.gather(2, index.flatten(2)[..., None].expand(-1, -1, -1, dim))
    return taken.view(*index.shape, dim).flatten(0, 1)
