"""A short causal convolution of each channel by itself, over the real tokens of a document.

    y_t = bias + sum_k weight[:, size - 1 - k] x_(t-k)

Shapes: x [batch, length, channels], weight [channels, size], bias [channels]; state [batch, size - 1, channels], the
last real tokens, zero where there are fewer; documents [batch, length] as in `documents.py`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .documents import document_runs, document_steps
from .precision import without_autocast
from .time_invariant import CHUNK, apply_chunks, toeplitz


def recurrent_convolution(x, weight, bias=None, *, documents=None, initial_state=None, output_final_state=False):
    """The definition above, one step at a time. The reference for tests, and the decoding step."""
    batch, length, channels = x.shape
    state = x.new_zeros(batch, weight.shape[1] - 1, channels) if initial_state is None else initial_state.to(x.dtype)
    if documents is not None:
        real, starts = document_steps(documents)
    outputs = []
    for t in range(length):
        before = state if documents is None else state * ~starts[:, t, None, None]
        window = torch.cat((before, x[:, t : t + 1]), dim=1)
        output = (window * weight.T).sum(1, keepdim=True)
        outputs.append(output if bias is None else output + bias)
        state = window[:, 1:] if documents is None else torch.where(real[:, t, None, None], window[:, 1:], state)
    output = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
    return output, state if output_final_state else None


def causal_convolution(x, weight, bias=None, *, documents=None, initial_state=None, output_final_state=False):
    """The same answer in parallel."""
    before, length = weight.shape[1] - 1, x.shape[1]
    x = F.pad(x, (0, 0, before, 0)) if initial_state is None else torch.cat((initial_state.to(x.dtype), x), dim=1)
    if documents is None:
        return Correlation.apply(x, weight, bias), x[:, length:] if output_final_state else None
    documents = F.pad(documents, (before, 0), value=1)  # what came before is of the first document
    real, document = document_runs(documents, x)
    place = real.cumsum(-1) - 1  # of each token among the real ones of its row; padding takes that of the last
    order = torch.argsort(~real, dim=1, stable=True)  # the real ones first
    x, document = x.gather(1, order[..., None].expand_as(x)), document.gather(1, order)
    y = weight[:, before] * x
    for back in range(1, before + 1):
        same = (document[:, back:] == document[:, :-back])[..., None]
        y = y + F.pad(weight[:, before - back] * x[:, :-back] * same, (0, 0, back, 0))
    y = y if bias is None else y + bias
    y = y.gather(1, place[:, before:, None].expand(-1, -1, y.shape[-1]))
    if not output_final_state:
        return y, None
    last = place[:, -1:] - torch.arange(before - 1, -1, -1, device=x.device)
    same = (document.gather(1, last) == document.gather(1, place[:, -1:]))[..., None]
    return y, x.gather(1, last[..., None].expand(-1, -1, x.shape[-1])) * same


def correlate(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """y_t = bias + sum_k weight[:, k] x_(t+k), of those that exist. As an image of one line with its channels last:
    conv1d would copy it to have them first."""
    image, kernel = x.transpose(1, 2)[:, :, None], weight[:, None, None]
    return F.conv2d(image, kernel, bias, groups=len(weight)).squeeze(2).transpose(1, 2)


class Correlation(torch.autograd.Function):
    """`correlate`, with a backward that takes two thirds of the time of conv2d's on a CPU."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return correlate(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        taps, length = weight.shape[1], grad.shape[1]
        with without_autocast(grad):
            of_x = correlate(F.pad(grad, (0, 0, taps - 1, taps - 1)), weight.flip(1).to(grad.dtype), None)
        of_weight = [(grad * x[:, tap : tap + length]).sum((0, 1)) for tap in range(taps)]
        return of_x, torch.stack(of_weight, dim=1), grad.sum((0, 1)) if ctx.needs_input_grad[2] else None


def chunk_convolution(x, weight, bias=None, *, documents=None, initial_state=None, output_final_state=False):
    """The same answer by matrix products, for convolutions over many tokens: those of a chunk, and of the one before
    it."""
    wide, before = torch.promote_types(x.dtype, torch.float32), weight.shape[1] - 1
    size = max(CHUNK, before + before % 2)
    taps = F.pad(weight.to(wide).flip(-1), (0, 2 * size - weight.shape[1]))
    chunks = TappedChunks(toeplitz(taps[:, :size]), toeplitz(taps[:, size:], taps[:, 1:size].flip(-1)))
    if initial_state is not None:
        initial_state = F.pad(initial_state.transpose(1, 2), (size - before, 0)).unflatten(-1, (-1, 2))
    told = {"documents": documents, "initial_state": initial_state, "output_final_state": output_final_state}
    y, state = apply_chunks(x, chunks, **told)
    y = y.contiguous() if bias is None else y + bias
    return y, None if state is None else state.flatten(-2)[..., size - before :].transpose(1, 2).to(x.dtype)


class TappedChunks(NamedTuple):
    """As `Chunks` of `time_invariant.py`: a state is the last tokens, as many as a chunk has."""

    within: torch.Tensor
    out_of: torch.Tensor

    @property
    def numbers(self) -> int:
        return self.within.shape[-1]

    def take_in(self, rows):
        return rows

    def carry(self, added, keep, state):
        first = torch.zeros_like(added[:, 0]) if state is None else state
        return torch.cat((first[:, None], added[:, :-1]), dim=1)

    def advance(self, state, count):
        place = torch.arange(self.numbers, device=state.device) + count[:, None]
        held = F.pad(state, (0, self.numbers))
        return held.gather(-1, place.expand(len(state), -1, -1))
