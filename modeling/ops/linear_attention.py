"""Linear attention (Katharopoulos et al., 2020, arXiv:2006.16236, equations 4-12): a mean of the values read, whose
weights are products of features that are nowhere negative.

    out_t = sum_(i<=t) (query_t . key_i) exp(log_scale_i) value_i / (the sum of these weights)

Shapes: query, key [batch, length, heads, features]; value [batch, length, heads, dim]; log_scale [batch, length,
heads], of any size; state [batch, heads, features, dim + 2], in float32 at least: for each feature the sum of the
values and the sum of the weights, both in the unit exp(the last number); documents [batch, length] as in
`documents.py`: padding adds nothing, the state is forgotten where a document starts, an initial state belongs to
document 1.

The unit is the largest exp(log_scale) that was read so far. Where it grows, what was read fades by the ratio: without
its denominator this is the recurrence of `decayed_attention.py`, no exponential is above 1, and the future has no part
in the past. Where all weights are too small for a number, the answer is 0.
"""

import torch
import torch.nn.functional as F

from .decayed_attention import chunk_decayed_attention
from .documents import document_runs, document_steps
from .precision import without_autocast

GROWTH = 20.0  # of the logarithm of a unit that numbers bear with ease
NO_UNIT = -1e30  # the logarithm of the unit of what is not there; unlike -inf it can be subtracted from itself


def recurrent_linear_attention(
    query, key, value, log_scale, *, documents=None, initial_state=None, output_final_state=False
):
    """The definition above, one step at a time. The reference for tests, and the decoding step."""
    wide = torch.promote_types(query.dtype, torch.float32)
    with without_autocast(query):
        q, k, v, log_scale = (x.to(wide) for x in (query, key, with_ones(value), log_scale))
        sums, unit = sums_and_unit(initial_state, k, v)
        if documents is not None:
            real, starts = document_steps(documents)
        outputs = []
        for t in range(q.shape[1]):
            new = log_scale[:, t]
            if documents is not None:
                new = new.masked_fill(~real[:, t, None], NO_UNIT)
                unit = unit.masked_fill(starts[:, t, None], NO_UNIT)
                sums = sums * ~starts[:, t, None, None, None]
            before, unit = unit, torch.maximum(unit, new.detach())
            weight = (new - unit).exp()
            if documents is not None:
                weight = weight * real[:, t, None]
            taken = (weight[..., None] * k[:, t])[..., None] * v[:, t, :, None]
            sums = torch.addcmul(taken, sums, (before - unit).exp()[..., None, None])
            outputs.append((q[:, t, :, None] @ sums).squeeze(-2))
        output = mean_of(torch.stack(outputs, dim=1))
        return output.to(value.dtype), as_state(sums, unit) if output_final_state else None


def chunk_linear_attention(
    query, key, value, log_scale, *, documents=None, initial_state=None, output_final_state=False, chunk_size=64
):
    """The same answer in parallel: attention inside a chunk, the recurrence between chunks."""
    wide = torch.promote_types(query.dtype, torch.float32)
    with without_autocast(query):
        q, k, v, log_scale = (x.to(wide) for x in (query, key, with_ones(value), log_scale))
        sums, unit = sums_and_unit(initial_state, k, v)
        if documents is not None:
            log_scale = log_scale.masked_fill((documents == 0)[..., None], NO_UNIT)
        last = None if documents is not None else one_unit(log_scale, unit)
        if last is not None:
            sums = sums * (unit - last).exp()[..., None, None]
            output, sums = unfading_attention(q, k, v * (log_scale - last[:, None]).exp()[..., None], sums, chunk_size)
        else:
            units, log_decay = growing_units(log_scale, documents, unit)
            last, gain = units[:, -1], (log_scale - units).exp()
            told = {"initial_state": sums, "output_final_state": True, "chunk_size": chunk_size}
            output, sums = chunk_decayed_attention(q, k, v, log_decay, gain, documents=documents, **told)
        return mean_of(output).to(value.dtype), as_state(sums, last) if output_final_state else None


@torch.no_grad()
def one_unit(log_scale: torch.Tensor, unit: torch.Tensor) -> torch.Tensor | None:
    """The last unit [batch, heads], where it can be that of all tokens: in the mean it goes out, and none sees numbers
    that are too small because of what follows. Else None, as where a look would cost a wait."""
    if log_scale.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    first = torch.maximum(unit, log_scale[:, 0])
    last = torch.maximum(first, log_scale.amax(dim=1))
    return last if (last - first).amax() < GROWTH else None


def unfading_attention(query, key, value, sums, chunk_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`decayed_attention.py` without a decay, on a CPU: the output, and the state after it."""
    shape, outputs = sums.shape[:2], []
    query, key, value = (x.transpose(1, 2).flatten(0, 1).split(chunk_size, dim=1) for x in (query, key, value))
    sums = sums.flatten(0, 1)
    for q, k, v in zip(query, key, value, strict=True):
        outputs.append(torch.baddbmm(q @ sums, (q @ k.mT).tril_(), v))
        sums = torch.baddbmm(sums, k.mT, v)
    return torch.cat(outputs, dim=1).unflatten(0, shape).transpose(1, 2), sums.unflatten(0, shape)


@torch.no_grad()
def growing_units(
    log_scale: torch.Tensor, documents: torch.Tensor | None, unit: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logarithm of the unit at each token, after `unit` [batch, heads], and by how much that before it is smaller,
    0 or less, both [batch, length, heads]; `log_scale` is NO_UNIT at padding."""
    same = torch.ones((), dtype=torch.bool, device=log_scale.device)
    if documents is None:
        units = torch.cat((unit[:, None], log_scale), dim=1).cummax(dim=1).values
    else:
        document = F.pad(document_runs(documents, log_scale)[1], (1, 0), value=1)
        units, step = torch.cat((unit[:, None], log_scale), dim=1), 1
        while step < units.shape[1]:  # the maximum over ever more tokens
            ahead = (document[:, step:] == document[:, :-step])[..., None]
            largest = torch.maximum(units[:, step:], units[:, :-step].masked_fill(~ahead, NO_UNIT))
            units, step = torch.cat((units[:, :step], largest), dim=1), 2 * step
        same = (document.diff(dim=1) == 0)[..., None]
    before, units = units[:, :-1], units[:, 1:]
    return units, torch.where(same & (before > NO_UNIT / 2), before - units, 0.0)


def gather_keys(key, value, log_scale, *, real=None, state=None):
    """The state of all keys at once, for queries that see both ways: of those that are `real` [batch, length], and of
    those in `state`."""
    wide = torch.promote_types(key.dtype, torch.float32)
    with without_autocast(key):
        k, v, log_scale = (x.to(wide) for x in (key, with_ones(value), log_scale))
        before, old_unit = sums_and_unit(state, k, v)
        if real is not None:
            log_scale = log_scale.masked_fill(~real[..., None], NO_UNIT)
        unit = torch.maximum(old_unit, log_scale.detach().amax(dim=1))
        weight = (log_scale - unit[:, None]).exp()
        if real is not None:
            weight = weight * real[..., None]
        sums = k.permute(0, 2, 3, 1) @ (v * weight[..., None]).transpose(1, 2)
        if state is not None:
            sums = torch.addcmul(sums, before, (old_unit - unit).exp()[..., None, None])
        return as_state(sums, unit)


def ask_keys(query, state):
    """What queries [batch, length, heads, features] get of all keys in a state: [batch, length, heads, dim]."""
    with without_autocast(query):
        return mean_of((query.transpose(1, 2).to(state.dtype) @ state[..., :-1]).transpose(1, 2))


def with_ones(value: torch.Tensor) -> torch.Tensor:
    """Values, and a column whose sum is that of the weights."""
    return F.pad(value, (0, 1), value=1.0)


def mean_of(sums: torch.Tensor) -> torch.Tensor:
    weight = sums[..., -1:]
    return sums[..., :-1] / weight.masked_fill(weight == 0, 1.0)


def sums_and_unit(state: torch.Tensor | None, key, value) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch, heads, features, dim + 1] and the logarithm of their unit [batch, heads]; keys and values [batch, length,
    heads, ...] tell the shapes of a state that is not there."""
    if state is None:
        sums = key.new_zeros(key.shape[0], *key.shape[2:], value.shape[-1])
        return sums, key.new_full(sums.shape[:2], NO_UNIT)
    state = state.to(key.dtype)
    read = (state[..., -2] > 0).any(-1)
    return state[..., :-1], torch.where(read, state[..., 0, -1].detach(), NO_UNIT)


def as_state(sums: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Zeros where nothing was read."""
    unit = unit.masked_fill(unit <= NO_UNIT / 2, 0.0)[..., None, None]
    return torch.cat((sums, unit.expand(*sums.shape[:-1], 1)), dim=-1)
