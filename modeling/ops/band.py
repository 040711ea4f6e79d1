"""Who sees whom in a band: each token sees those near to it, and some that all see (Longformer, arXiv:2004.05150).

A token sees, of its own document, the `before` tokens before it and the `after` tokens after it, itself, and the
landmarks; of a band without an after, which is causal, only landmarks that are not after it. With a `dilation` of d, it
sees only every d-th token, as many, so that it reaches d times as far. Distances are counted in real tokens.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers.utils.import_utils import is_tracing

# Queries of a block: the least that fills a matrix product, and the most, without a backward pass and with one, which
# has more trouble with each block
LEAST, MOST = 32, {False: 128, True: 256}
NONE, NO_QUERY = -2, -1  # in the place of a document's number: no key, and no query


def visible_in_band(
    documents: torch.Tensor,
    before: int,
    after: int,
    dilation: int = 1,
    landmarks: torch.Tensor | None = None,
    queries: int = 0,
) -> torch.Tensor:
    """The definition: [batch, queries, length], whether a query (row) sees a key; the queries are the last tokens, all
    by default. documents [batch, length] as in `documents.py`, where padding sees padding; landmarks [batch, length]
    bool."""
    place = ranks(documents)
    distance = place[:, None, :] - place[:, -queries:, None]
    seen = (distance >= -before * dilation) & (distance <= after * dilation) & (distance % dilation == 0)
    if landmarks is not None:
        seen = seen | (landmarks[:, None, :] & ((distance <= 0) | (after > 0)))
    return seen & (documents[:, None, :] == documents[:, -queries:, None])


def ranks(documents: torch.Tensor) -> torch.Tensor:
    """[batch, length] where each token stands when real tokens come first, in their order, and padding last."""
    real = documents > 0
    return torch.where(real, real.cumsum(1), real.sum(1, keepdim=True) + (~real).cumsum(1)) - 1


class Band(NamedTuple):
    """Who sees whom in a batch, in blocks: made once by `make_band`, for all layers with the same band."""

    length: int
    block: int
    before: int  # keys before those of the block, among tokens that may see each other
    after: int
    dilation: int
    mask: torch.Tensor  # [batch * dilation * blocks, 1, block, keys and landmarks], added to the scores
    landmarks: torch.Tensor | None  # [batch, count] where they are, among tokens in order
    order: torch.Tensor | None  # [batch, length] the columns of the tokens in order, None where they are in order

    @property
    def blocks(self) -> int:
        return -(-self.length // (self.block * self.dilation))

    @property
    def keys(self) -> int:
        """How many keys a block has around it."""
        return self.before + self.block + self.after

    def in_order(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch, length, ...] with the tokens in order."""
        return x if self.order is None else take(x, self.order)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, length, ...] -> [batch * dilation * blocks, block, ...]."""
        return self.rows(self.in_order(x), 0).flatten(0, 1).unflatten(0, (-1, self.block))

    def around_queries(self, x: torch.Tensor, value: int = 0) -> torch.Tensor:
        """[batch, length, ...] in order -> [batch * dilation * blocks, keys, ...], `value` past the ends."""
        rows = F.pad(self.rows(x, value), (0, 0) * (x.ndim - 2) + (self.before, self.after), value=value)
        return rows.unfold(1, self.keys, self.block).movedim(-1, 2).flatten(0, 1)

    def rows(self, x: torch.Tensor, value: int) -> torch.Tensor:
        """[batch, length, ...] -> [batch * dilation, blocks * block, ...]: tokens that may see each other as rows."""
        missing = self.blocks * self.block * self.dilation - x.shape[1]
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing), value=value) if missing else x
        return x if self.dilation == 1 else x.unflatten(1, (-1, self.dilation)).transpose(1, 2).flatten(0, 1)

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `queries`."""
        rows = x.unflatten(0, (-1, self.blocks)).flatten(1, 2)
        if self.dilation > 1:
            rows = rows.unflatten(0, (-1, self.dilation)).transpose(1, 2).flatten(1, 2)
        rows = rows[:, : self.length]
        return rows if self.order is None else take(rows, self.order.argsort(1))

    def beside_landmarks(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, length, heads, dim] -> [batch * dilation * blocks, keys and landmarks, heads, dim]."""
        x = self.in_order(x)
        around = self.around_queries(x)
        if self.landmarks is None:
            return around
        copies = take(x, self.landmarks)[:, None].expand(-1, around.shape[0] // x.shape[0], -1, -1, -1)
        return torch.cat((around, copies.flatten(0, 1)), dim=1)


def take(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """x [batch, length, ...] at columns [batch, count]."""
    index = columns.view(*columns.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


def make_band(
    like: torch.Tensor,
    before: int,
    after: int,
    dilation: int = 1,
    documents: torch.Tensor | None = None,
    landmarks: torch.Tensor | None = None,
    landmark_count: int | None = None,
) -> Band:
    """The band of a batch like `like` [batch, length, ...]; documents and landmarks as for `visible_in_band`.
    `landmark_count` is how many a row has at most, where that is known."""
    batch, length = like.shape[:2]
    if documents is None:
        documents = torch.ones(batch if landmarks is not None else 1, length, dtype=torch.long, device=like.device)
        order = None
    else:
        order = order_of(documents)
    if order is not None:
        documents, landmarks = (None if x is None else x.gather(1, order) for x in (documents, landmarks))
    steps = -(-length // dilation)
    causal, before, after = after == 0, min(before, steps - 1), min(after, steps - 1)
    most = MOST[torch.is_grad_enabled()]
    block = min(max(LEAST, 2 ** round(math.log2(max(before, after, 1) * most / 256))), most, steps)
    whole = steps <= before + block + after  # one block of all is less work
    block, around = (steps, (0, 0)) if whole else (block, (before, after))
    band = Band(length, block, *around, dilation, like, None, order)
    queries, keys = band.rows(documents, NO_QUERY), documents
    if landmarks is not None:
        keys = keys.masked_fill(landmarks, NONE)
    queries = queries.flatten(0, 1).unflatten(0, (-1, block))[..., None]
    distance = torch.arange(band.keys, device=like.device) - band.before
    distance = distance - torch.arange(block, device=like.device)[:, None]
    seen = (queries == own_or_near(band, keys)) & (distance >= -before) & (distance <= after)
    if landmarks is not None:
        found, there = landmark_columns(landmarks, landmark_count)
        if found.shape[1]:
            seen = torch.cat((seen, sees_landmarks(band, queries, documents, found, there, causal)), dim=-1)
            band = band._replace(landmarks=found)
    mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -math.inf)
    return band._replace(mask=mask.repeat(batch // documents.shape[0], 1, 1)[:, None])


def neighbouring_blocks(like: torch.Tensor, real: torch.Tensor | None, block: int) -> Band:
    """The band of rows like `like` [rows, length, ...] in which a token sees its block, the one before and the one
    after; `real` [rows, length] tells tokens from what comes after them."""
    length = like.shape[1]
    if real is None:
        real = torch.ones(1, length, dtype=torch.bool, device=like.device)
    around = 0 if length <= block else block
    band = Band(length, min(block, length), around, around, 1, like, None, None)
    queries = band.rows(real.long(), NO_QUERY).flatten(0, 1).unflatten(0, (-1, band.block))[..., None]
    seen = queries == own_or_near(band, real.long())
    mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -math.inf)
    return band._replace(mask=mask.repeat(like.shape[0] // real.shape[0], 1, 1)[:, None])


def order_of(documents: torch.Tensor) -> torch.Tensor | None:
    """The columns of real tokens, then those of padding; None where no padding lies between real tokens."""
    real = documents > 0
    if not is_tracing(real) and ((real[:, 1:] > real[:, :-1]).sum(1) + real[:, 0] <= 1).all():
        return None
    return (~real).long().sort(dim=1, stable=True).indices


def own_or_near(band: Band, keys: torch.Tensor) -> torch.Tensor:
    """[rows * blocks, 1, keys] the documents of the keys around each block. A query without a token sees those."""
    return band.around_queries(band_edges(band, keys), NONE)[:, None]


def band_edges(band: Band, keys: torch.Tensor) -> torch.Tensor:
    """keys [batch, length] with a number for places past the end, which only queries there have."""
    missing = band.blocks * band.block * band.dilation - band.length
    return F.pad(keys, (0, missing), value=NO_QUERY)


def landmark_columns(landmarks: torch.Tensor, most: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns [batch, count] of the landmarks of each row, all different, and whether there is one; rows with fewer are
    filled up with other columns."""
    counts = landmarks.sum(1)
    most = int(counts.max()) if most is None else min(most, landmarks.shape[1])
    columns = landmarks.long().sort(dim=1, descending=True, stable=True).indices[:, :most]
    return columns, torch.arange(most, device=landmarks.device) < counts[:, None]


def sees_landmarks(band: Band, queries, documents, found, there, causal: bool) -> torch.Tensor:
    """[rows * blocks, block, count] whether a query sees each landmark."""
    copies = queries.shape[0] // found.shape[0]
    numbers = documents.gather(1, found).masked_fill(~there, NONE).repeat_interleave(copies, 0)[:, None]
    seen = queries == numbers
    if causal:
        column = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
        column = band.rows(column, documents.shape[1]).flatten(0, 1).unflatten(0, (-1, band.block))
        seen = seen & (found.repeat_interleave(copies, 0)[:, None] <= column[..., None])
    return seen
