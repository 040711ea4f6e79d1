"""Causal attention within buckets: of locality-sensitive hashing (Reformer, arXiv:2001.04451) or of nearest centroids
(Routing Transformer, arXiv:2003.05997).

The tokens of a document that share a bucket are ranked by their arrival, and the ranks cut into blocks. A token sees
those of its bucket that are not after it, in its own block and in the block before. So the future changes nothing, and
what a bucket has to remember is two blocks. In several rounds a token has a bucket for each, and what it sees in n of
them counts n times. Where `sees_itself` is false, it sees itself only if it sees no other.

Shapes: query, key [batch, length, heads, dim], value [batch, length, heads, value_dim]; buckets [batch, length, heads
or 1, rounds], whole numbers below `num_buckets`; documents [batch, length] as in `documents.py`. A state is a store of
keys and values side by side, [batch, heads, rounds, num_buckets, 2 * block, dim + value_dim], in which a token has the
place of its rank modulo 2 * block, and how many came so far, [batch, heads or 1, rounds, num_buckets]; an initial state
belongs to document 1. Scores are taken as they come: queries are scaled before.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.utils.import_utils import is_tracing

from .arrangement import HIDDEN, ITSELF, Windows, arrangement_by, attend_to_windows, join_rounds, least_of, weights_of
from .documents import document_steps

CHUNK_OF_SORTED = 64  # queries that are handled side by side

State = tuple[torch.Tensor, torch.Tensor]


def reach_of(rank: torch.Tensor, block: int) -> torch.Tensor:
    """How many tokens before it in its bucket a token of this rank sees."""
    return torch.minimum(rank, block + rank % block)


def recurrent_bucketed_attention(
    query,
    key,
    value,
    buckets,
    *,
    num_buckets,
    block,
    sees_itself=True,
    dropout=0.0,
    documents=None,
    initial_state=None,
    output_final_state=False,
    in_place=False,
):
    """The definition above, one step at a time. The reference for tests, and the decoding step, which reads and writes
    one bucket: with `in_place` in the store of the initial state, which is the final one, too."""
    if initial_state is None:
        initial_state = empty_state(key, value, buckets, num_buckets, block)
    store, count = initial_state
    store = store if in_place else store.clone()
    if documents is not None:
        real, starts = document_steps(documents)
    place = torch.arange(2 * block, device=query.device)
    row, head, turn = (torch.arange(n, device=query.device) for n in store.shape[:3])
    row, head = row[:, None, None], head[:, None]
    line = (row * len(head) + head) * len(turn) + turn
    tokens, outputs = torch.cat((key, value), dim=-1).to(store.dtype), []
    for t in range(query.shape[1]):
        if documents is not None and (is_tracing(starts) or starts[:, t].any()):
            count = count.masked_fill(starts[:, t].view(-1, 1, 1, 1), 0)
            store.masked_fill_(starts[:, t].view(-1, 1, 1, 1, 1, 1), 0)
        bucket = buckets[:, t, :, :, None]
        rank = count.gather(-1, bucket)
        age = (rank - place) % (2 * block)  # of what is in each place of the bucket, 0 for the token itself
        token, counted = tokens[:, t, :, None], rank * 0 + 1
        own = row, head, turn, bucket[..., 0], rank[..., 0] % (2 * block)
        if documents is not None:
            token = torch.where(real[:, t, None, None, None], token, store[own])
            counted = counted * real[:, t, None, None, None]
        store.index_put_(own, token.expand(*store.shape[:3], -1))
        count = count.scatter_add(-1, bucket, counted)
        numbers = bucket[..., 0] + num_buckets * line
        held = store.flatten(0, 3).index_select(0, numbers.flatten()).unflatten(0, numbers.shape)
        hidden, itself = age > reach_of(rank, block), None if sees_itself else age == 0
        outputs.append(attend_to_bucket(query[:, t], held, hidden, itself, dropout))
    return torch.stack(outputs, dim=1).to(value.dtype), (store, count) if output_final_state else None


def attend_to_bucket(query, held, hidden, itself: torch.Tensor | None, dropout: float) -> torch.Tensor:
    """What queries [batch, heads, dim] answer, [batch, heads, value_dim], to what is `held` in their buckets."""
    keys, values = held.tensor_split((query.shape[-1],), dim=-1)
    scores = (keys @ query[:, :, None, :, None].to(keys.dtype)).squeeze(-1)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(hidden, HIDDEN)
    if itself is not None:
        scores = scores + ITSELF * itself
    weights = F.dropout(scores.flatten(2).softmax(-1), dropout).view(scores.shape).to(values.dtype)
    return (weights[..., None, :] @ values).sum(2).squeeze(2)


def empty_state(key, value, buckets, num_buckets: int, block: int) -> State:
    batch, _, heads, dim = key.shape
    rounds = buckets.shape[3]
    store = key.new_zeros(batch, heads, rounds, num_buckets, 2 * block, dim + value.shape[-1])
    return store, buckets.new_zeros(batch, buckets.shape[2], rounds, num_buckets)


class Order(NamedTuple):
    """Tokens by document, by bucket, by arrival; [batch, heads or 1, rounds, length] each."""

    column: torch.Tensor
    bucket: torch.Tensor
    rank: torch.Tensor  # in its bucket
    last: torch.Tensor  # whether it is of the last document of its row


def bucketed_attention(
    query,
    key,
    value,
    buckets,
    *,
    num_buckets,
    block,
    sees_itself=True,
    dropout=0.0,
    documents=None,
    initial_state=None,
    output_final_state=False,
):
    """The same answer in parallel. Sorted tokens attend in chunks, to their own chunk and to those before that the two
    blocks may reach into: the work is linear in the length, and the same for any number of buckets."""
    length, (heads, rounds) = query.shape[1], (query.shape[2], buckets.shape[3])
    numbers, last = document_and_bucket(buckets, documents, num_buckets)
    base = None
    if initial_state is not None:
        query, key, value, numbers, base = after_state(query, key, value, numbers, initial_state, num_buckets, block)
    order = rank_in_buckets(numbers, last, num_buckets, base)
    if num_buckets == rounds == 1 and documents is None and initial_state is None:
        output = attend_in_line(query, key, value, block, sees_itself, dropout)
    else:
        answers = attend_in_chunks(query, key, value, order, block, sees_itself, dropout, rounds > 1)
        if initial_state is not None:
            answers = (None if x is None else x[:, -length:].view(len(x), length, heads, rounds, -1) for x in answers)
        output = join_rounds(*answers)
    if not output_final_state:
        return output, None
    store, count = state_of(key, value, order, num_buckets, block)
    if initial_state is not None:
        store, count = (x.squeeze(2).unflatten(1, (-1, rounds)) for x in (store, count))
    return output, (store, count[:, : buckets.shape[2]])


def document_and_bucket(
    buckets: torch.Tensor, documents: torch.Tensor | None, num_buckets: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers [batch, heads or 1, rounds, length] that are equal for tokens of one document and bucket, greater for
    later documents, greatest for padding; and the last document of each row."""
    buckets = buckets.permute(0, 2, 3, 1)
    if documents is None:
        return buckets + num_buckets, buckets.new_ones(buckets.shape[0], 1, 1, 1)
    last = documents.amax(1).clamp(min=1)[:, None, None, None]
    documents = documents.masked_fill(documents == 0, documents.shape[1] + 1)
    return buckets + num_buckets * documents[:, None, None], last


def after_state(query, key, value, numbers, state: State, num_buckets: int, block: int):
    """The tokens of a state, the oldest of a bucket first, and then the new ones; with a head for each round, since
    rounds remember different tokens. Also how many tokens of each bucket the state has forgotten."""
    store, count = state
    heads, rounds = store.shape[1:3]
    room = torch.arange(2 * block, device=query.device)
    place = ((count[..., None] + room) % (2 * block))[..., None].expand(-1, heads, -1, -1, -1, store.shape[-1])
    held = store.gather(4, place).flatten(3, 4).flatten(1, 2).transpose(1, 2)  # [batch, places, heads * rounds, dims]
    bucket = torch.arange(num_buckets, device=query.device)[:, None]
    there = count[..., None] - 2 * block + room >= 0
    nowhere = (numbers.amax() // num_buckets + 1).clamp(min=2) * num_buckets  # a document after all others
    before = torch.where(there, num_buckets + bucket, nowhere).flatten(3)
    numbers, base = torch.cat((before, numbers), dim=-1), (count - 2 * block).clamp(min=0)
    if rounds > 1:
        numbers, base = (x.expand(-1, heads, -1, -1) for x in (numbers, base))
    numbers, base = (x.flatten(1, 2)[:, :, None] for x in (numbers, base))
    query, key, value = (x.repeat_interleave(rounds, dim=2) for x in (query, key, value))
    keys, values = (x.to(key.dtype) for x in held.split((key.shape[-1], value.shape[-1]), dim=-1))
    query = F.pad(query, (0, 0, 0, 0, held.shape[1], 0))
    return query, torch.cat((keys, key), dim=1), torch.cat((values, value), dim=1), numbers, base


def rank_in_buckets(numbers: torch.Tensor, last: torch.Tensor, num_buckets: int, base: torch.Tensor | None) -> Order:
    numbers, column = numbers.sort(dim=-1, stable=True)
    document, bucket = numbers // num_buckets, numbers % num_buckets
    position = torch.arange(numbers.shape[-1], device=numbers.device)
    starts = F.pad(numbers.diff(dim=-1) != 0, (1, 0), value=True)
    rank = position - torch.where(starts, position, 0).cummax(dim=-1).values
    if base is not None:
        rank = rank + base.gather(-1, bucket) * (document == 1)
    return Order(column, bucket, rank, document == last)


def attend_in_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    order: Order,
    block: int,
    sees_itself: bool,
    dropout: float,
    joined: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What each round answers, [batch, length, heads, rounds, value_dim], and, where rounds are to be `joined`, the
    logarithm of the sum of its weights, [batch, length, heads, rounds, 1]."""
    length, heads = query.shape[1:3]
    size = min(CHUNK_OF_SORTED, length)
    chunks = -(-length // size)
    back = min(2 * block, (chunks - 1) * size)  # tokens before a chunk that it may see, and one
    sorted_ = arrangement_by(order.column, heads, chunks * size)
    query = sorted_.arrange(query).unflatten(0, (-1, size))
    keys, values = (Windows.apply(sorted_.arrange(x, back), size, back) for x in (key, value))

    reach = F.pad(reach_of(order.rank, block), (0, chunks * size - length)).unflatten(-1, (chunks, size))
    mask = masks_by_reach(reach, back, sees_itself, query.dtype)  # [batch, heads or 1, rounds, chunks, size, keys]
    mask = mask.expand(-1, heads, -1, -1, -1, -1).flatten(0, 3)[:, None]
    answers = attend_to_windows(*(x[:, None] for x in (query, keys, values)), mask, dropout, joined)
    return tuple(None if x is None else sorted_.restore(x.flatten(0, 2)) for x in answers)


def masks_by_reach(reach: torch.Tensor, back: int, sees_itself: bool, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores of chunks [..., size, back + size] whose queries see as many tokens before them as
    `reach` [..., size] says: each row is a part of a line of a table, which holds a line for each reach."""
    size = reach.shape[-1]
    keys = back + size
    line = size + keys - 1
    age = keys - 1 - torch.arange(line, device=reach.device)  # of a key, where the line begins at the first query's
    farthest = torch.arange(keys, device=reach.device)[:, None]
    table = torch.zeros(keys, line, dtype=dtype, device=reach.device)
    table = table.masked_fill((age < 0) | (age > farthest), -torch.inf)
    if not sees_itself:
        table = table.masked_fill(age == 0, least_of(dtype))
    start = reach.clamp(max=keys - 1) * line + size - 1 - torch.arange(size, device=reach.device)
    return table.flatten().unfold(0, keys, 1).index_select(0, start.flatten()).view(*reach.shape, keys)


def attend_in_line(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: int, sees_itself: bool, dropout: float
) -> torch.Tensor:
    """The same where all tokens are of one bucket: they are in order, and chunks are blocks."""
    batch, length, heads = query.shape[:3]
    size = min(block, length)
    chunks = -(-length // size)
    back = size if chunks > 1 else 0
    if missing := chunks * size - length:
        query, key, value = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (query, key, value))
    query, key, value = (x.flatten(2).flatten(0, 1) for x in (query, key, value))
    query = query.view(-1, size, heads, query.shape[-1] // heads)
    keys, values = (
        Windows.apply(F.pad(x, (0, 0, back, 0)), size, back).unflatten(-1, (heads, -1)) for x in (key, value)
    )
    column = torch.arange(back + size, device=query.device)
    distance = column[:size, None] + back - column
    token = torch.arange(chunks, device=query.device)[:, None, None] * size - back + column
    mask = torch.zeros(chunks, 1, *distance.shape, dtype=query.dtype, device=query.device)
    mask = mask.masked_fill_(((distance < 0) | (token < 0))[:, None], -torch.inf).repeat(batch, 1, 1, 1)
    if not sees_itself:
        mask = mask.masked_fill_(distance == 0, least_of(mask.dtype))
    windows = (x.transpose(1, 2) for x in (query, keys, values))
    output, _ = attend_to_windows(*windows, mask, dropout, joined=False)
    return output.transpose(1, 2).reshape(batch, chunks * size, heads, -1)[:, :length]


def state_of(key: torch.Tensor, value: torch.Tensor, order: Order, num_buckets: int, block: int) -> State:
    """What is left after these tokens: of each bucket those of the last document, the last 2 * block."""
    batch, length, heads = key.shape[:3]
    count = torch.zeros_like(order.rank[..., :1]).repeat(1, 1, 1, num_buckets)
    count = count.scatter_reduce(-1, order.bucket, (order.rank + 1) * order.last, "amax")
    kept = order.last & (order.rank >= count.gather(-1, order.bucket) - 2 * block)
    place = order.bucket * 2 * block + order.rank % (2 * block)
    places = num_buckets * 2 * block
    source = order.column.new_full((*count.shape[:3], places + 1), -1)
    source = source.scatter_(-1, place.masked_fill(~kept, places), order.column)[..., :-1]
    row = torch.arange(batch, device=key.device)[:, None, None, None]
    head = torch.arange(heads, device=key.device)[:, None, None]
    flat = (row * length + source.clamp(min=0)) * heads + head
    there = (source >= 0)[..., None].expand(-1, heads, -1, -1, -1)
    held = torch.cat((key, value), dim=-1).flatten(0, 2).index_select(0, flat.flatten()).view(*there.shape[:4], -1)
    return (held * there).unflatten(3, (num_buckets, 2 * block)), count


def bucketed_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    buckets: torch.Tensor,
    *,
    num_buckets: int,
    block: int,
    sees_itself: bool,
    documents: torch.Tensor | None,
) -> torch.Tensor:
    """The weights of all pairs, [batch, heads, length, length]: as many as those of full attention."""
    numbers, last = document_and_bucket(buckets, documents, num_buckets)
    order = rank_in_buckets(numbers, last, num_buckets, None)
    rank = torch.empty_like(order.rank).scatter(-1, order.column, order.rank) // block
    apart = rank[..., :, None] - rank[..., None, :]
    seen = (numbers[..., :, None] == numbers[..., None, :]) & (apart >= 0) & (apart <= 1)
    return weights_of(query, key, seen.sum(2).tril(), sees_itself)
