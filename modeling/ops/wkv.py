"""WKV, the attention of RWKV-4 (Peng et al., 2023, arXiv:2305.13048, equation 16): a mean of the values read, whose
weights exp(key) fade by a fixed factor per step and channel; the current token has a weight of its own.

    out_t = (sum_(i<t) exp((t-1-i) log_decay + key_i) value_i + exp(bonus + key_t) value_t) / (the sum of these weights)

Shapes: key, value [batch, length, channels]; log_decay [channels], 0 or less; bonus [channels]; state [batch, 3,
channels], in float32 at least: the mean of the values read, 1 where any was read, the logarithm of the sum of their
weights; documents [batch, length] as in `documents.py`: padding adds nothing and fades nothing, the state is forgotten
where a document starts, an initial state belongs to document 1.

Weights are never made, only differences of their logarithms: keys and decays may be of any size.
"""

import math
import re

import torch

from .dispatch import accelerated
from .documents import document_steps
from .precision import without_autocast

NOTHING = -1e30  # the logarithm of the weight of what is not there; unlike -inf it can be subtracted from itself


def recurrent_wkv(key, value, log_decay, bonus, *, documents=None, initial_state=None, output_final_state=False):
    """The definition above, one step at a time. The reference for tests, and the decoding step."""
    k, v, log_decay, bonus, reset, fade, mean, weight = prepared_for_wkv(
        key, value, log_decay, bonus, documents, initial_state
    )
    outputs = []
    with without_autocast(key):
        for t, (k_t, v_t) in enumerate(zip(k.unbind(1), v.unbind(1), strict=True)):
            if reset is not None:
                weight = weight + reset[:, t]
            outputs.append(torch.lerp(mean, v_t, torch.sigmoid(k_t + bonus - weight)))
            weight = weight + (log_decay if fade is None else fade[:, t] * log_decay)
            mean = torch.lerp(mean, v_t, torch.sigmoid(k_t - weight))
            weight = torch.logaddexp(weight, k_t)
    output = outputs[0][:, None] if len(outputs) == 1 else torch.stack(outputs, dim=1)
    return output.to(value.dtype), wkv_state(mean, weight) if output_final_state else None


def fla_wkv(kernel, key, value, log_decay, bonus, *, documents=None, initial_state=None, output_final_state=False):
    """flash-linear-attention's kernel, whose state is (numerator, denominator, logarithm of what both lack). It knows
    neither documents nor padding."""
    if documents is not None:
        return NotImplemented
    wide = torch.promote_types(key.dtype, torch.float32)
    if initial_state is None:
        initial_state = key.new_zeros(key.shape[0], 3, key.shape[-1], dtype=wide)
    mean, read, weight = initial_state.to(wide).unbind(1)
    state = torch.stack((mean, read, torch.where(read > 0, weight, NOTHING)), dim=1)[:, :, None]
    tensors = (-log_decay.to(wide)).log(), bonus.to(wide), key.to(wide), value.to(wide)
    output, state = kernel(*(tensor.contiguous() for tensor in tensors), state)
    numerator, denominator, weight = state.squeeze(2).unbind(1)
    final_state = wkv_state(numerator / denominator, weight + denominator.log())
    return output.to(value.dtype), final_state if output_final_state else None


@accelerated("fla.ops.rwkv4:fused_recurrent_rwkv4", adapt=fla_wkv, packs=False)
def chunk_wkv(
    key, value, log_decay, bonus, *, documents=None, initial_state=None, output_final_state=False, chunk_size=None
):
    """The same answer with chunks side by side: what each adds up by itself, the recurrence between chunks, then all
    steps again from there. Its backward is such a recurrence from the end (`WKV`)."""
    tensors = prepared_for_wkv(key, value, log_decay, bonus, documents, initial_state)
    with without_autocast(key):
        output, mean, weight = WKV.apply(*tensors, chunk_size)
    return output.to(value.dtype), wkv_state(mean, weight) if output_final_state else None


def prepared_for_wkv(key, value, log_decay, bonus, documents, state) -> tuple:
    """Everything wide, keys NOTHING at padding; where documents start, as logarithms, and whether a token is real, both
    [batch, length, 1] or None; the mean and the logarithm of the weight of the state, [batch, channels]."""
    wide = torch.promote_types(key.dtype, torch.float32)
    key, value, log_decay, bonus = (tensor.to(wide) for tensor in (key, value, log_decay, bonus))
    reset = fade = None
    if documents is not None:
        real, start = document_steps(documents)
        reset, fade = (start[..., None].to(wide) * NOTHING), real[..., None].to(wide)
        key = key.masked_fill(~real[..., None], NOTHING)
    if state is None:
        mean = key.new_zeros(key[:, 0].shape)
        return key, value, log_decay, bonus, reset, fade, mean, torch.full_like(mean, NOTHING)
    mean, read, weight = state.to(wide).unbind(1)
    return key, value, log_decay, bonus, reset, fade, mean, torch.where(read > 0, weight, NOTHING)


def wkv_state(mean: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[batch, 3, channels], zeros where nothing was read."""
    read = weight > NOTHING / 2
    return torch.stack((mean, torch.ones_like(mean), weight), dim=1) * read[:, None]


def join_means(means, weight, values, log_weight) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Means of what has `weight`, of what has `log_weight` (logarithms both), together."""
    share = torch.sigmoid(log_weight - weight)
    means = [torch.lerp(mean, value, share) for mean, value in zip(means, values, strict=True)]
    larger = torch.maximum(share, 1 - share).log_()  # the share of the heavier of the two
    return means, torch.maximum(weight, log_weight).sub_(larger)


def scan_means(
    log_weight, values, log_decay, reset, means, weight, size: int, backwards: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """What was read before each step, from `means` and `weight` on: the means of `values`, their weight, both
    [batch, length, channels], and then the two after all steps. `log_decay` is of all steps, or [batch, length,
    channels]. The last steps, fewer than `size`, are a row of their own."""
    length = log_weight.shape[1]
    size = size if length > 3 else length
    whole = length - length % size
    before, log_before = [torch.empty_like(value) for value in values], torch.empty_like(log_weight)
    pieces = [(slice(0, whole), size), (slice(whole, length), length - whole)]
    for part, steps in reversed(pieces) if backwards else pieces:
        if part.start < part.stop:
            decay = log_decay if log_decay.ndim == 1 else log_decay[:, part].unflatten(1, (-1, steps))
            rows = [
                None if tensor is None else tensor[:, part].unflatten(1, (-1, steps))
                for tensor in (log_weight, reset, log_before, *values, *before)
            ]
            means, weight = scan_rows(decay, rows[:3], rows[3:], means, weight, backwards)
    return before, log_before, means, weight


def scan_rows(log_decay, rows, values_and_means, means, weight, backwards: bool):
    """`scan_means` of rows [batch, rows, steps, channels] side by side, which writes what was read before each step."""
    log_weight, reset, log_before = rows
    values, before = values_and_means[: len(means)], values_and_means[len(means) :]
    steps = list(range(log_weight.shape[2]))
    if backwards:
        steps.reverse()

    def faded(weight, n):
        return weight + (log_decay if log_decay.ndim == 1 else log_decay[:, :, n])

    if log_weight.shape[1] == 1:
        means, weight = [mean[:, None] for mean in means], weight[:, None]
    else:
        sums, log_sum = [value[:, :, steps[0]] for value in values], log_weight[:, :, steps[0]]
        for n in steps[1:]:
            log_sum = faded(log_sum if reset is None else log_sum + reset[:, :, n], n)
            sums, log_sum = join_means(sums, log_sum, [value[:, :, n] for value in values], log_weight[:, :, n])
        across = len(steps) * log_decay if log_decay.ndim == 1 else log_decay.sum(2)
        across = across if reset is None else across + reset.sum(2)
        size = math.isqrt(log_sum.shape[1])
        means, weight, _, _ = scan_means(log_sum, sums, across, None, means, weight, size, backwards)

    for n in steps:
        if reset is not None:
            weight = weight + reset[:, :, n]
        log_before[:, :, n] = weight
        for written, mean in zip(before, means, strict=True):
            written[:, :, n] = mean
        means, weight = join_means(means, faded(weight, n), [value[:, :, n] for value in values], log_weight[:, :, n])
    last = 0 if backwards else -1
    return [mean[:, last] for mean in means], weight[:, last]


# Named by its module: a process may hold this code several times, in the folders of exported models
@torch.library.custom_op("hf_arch::wkv_scan_" + re.sub(r"\W", "_", __name__), mutates_args=())
def wkv_scan(
    log_weight: torch.Tensor,
    values: list[torch.Tensor],
    log_decay: torch.Tensor,
    reset: torch.Tensor | None,
    means: list[torch.Tensor],
    weight: torch.Tensor,
    size: int,
    backwards: bool,
) -> list[torch.Tensor]:
    """`scan_means` as one node of a compiled graph, which would hold thousands, and take minutes to make, otherwise."""
    before, log_before, means, weight = scan_means(log_weight, values, log_decay, reset, means, weight, size, backwards)
    return [*before, log_before, *means, weight]


@wkv_scan.register_fake
def wkv_scan_shapes(log_weight, values, log_decay, reset, means, weight, size, backwards):
    return [torch.empty_like(tensor) for tensor in (*values, log_weight, *means, weight)]


class WKV(torch.autograd.Function):
    """(output, the mean and the weight in the end). With D_t the sum of weights in out_t, and grad_t its gradient, what
    a token passes back to those before it are sums that fade like the state,

        grad_value_i = exp(key_i) sum_(t>i) exp((t-1-i) log_decay) grad_t / D_t + ...,

    so that a scan from the end finds them, with the weights 1 / D_t."""

    @staticmethod
    def forward(ctx, key, value, log_decay, bonus, reset, fade, mean, weight, chunk_size):
        ctx.size = chunk_size or math.isqrt(key.shape[1])
        decay = log_decay if fade is None else fade * log_decay
        before, log_before, last, log_last = wkv_scan(key, [value], decay, reset, [mean], weight, ctx.size, False)
        ctx.save_for_backward(
            key, value, log_decay, bonus, reset, fade, mean, weight, before, log_before, last, log_last
        )
        share = (key + bonus).sub_(log_before).sigmoid_()
        return torch.lerp(before, value, share), last, log_last

    @staticmethod
    def backward(ctx, grad, grad_last, grad_log_last):
        key, value, log_decay, bonus, reset, fade, mean, weight, before, log_before, last, log_last = ctx.saved_tensors
        decay, own = log_decay if fade is None else fade * log_decay, key + bonus
        (output,), total = join_means([before], log_before, [value], own)
        own = (own - total).exp_()  # the share of a token in its own output
        log_weight, after = total.neg_(), None
        if fade is not None:
            grad, log_weight = grad * fade, log_weight.masked_fill_(fade == 0, NOTHING)
            after = torch.cat((reset[:, 1:], torch.zeros_like(reset[:, :1])), dim=1)
        start = torch.where(log_last > NOTHING / 2, -log_last, NOTHING)
        ahead, ahead_output, log_ahead, first, first_output, log_first = wkv_scan(
            log_weight,
            [grad, grad * output],
            decay,
            after,
            [grad_last, grad_last * last - grad_log_last],
            start,
            ctx.size,
            True,
        )
        taken = (key + log_ahead).exp_()
        grad_own = own * grad
        grad_value = (taken * ahead).add_(grad_own)
        grad_own = grad_own * (value - output)
        grad_key = (value * ahead - ahead_output).mul_(taken).add_(grad_own)
        kept = (log_before + log_ahead).add_(decay).exp_()
        kept = (ahead * before - ahead_output).mul_(kept if fade is None else kept * fade)
        kept_first = (weight + log_first if reset is None else weight + log_first + reset[:, 0]).exp_()
        return (
            grad_key,
            grad_value,
            kept.sum((0, 1)),
            grad_own.sum((0, 1)),
            None,
            None,
            first * kept_first,
            (first * mean - first_output) * kept_first,
            None,
        )
