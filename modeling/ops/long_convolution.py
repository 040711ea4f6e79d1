"""A convolution of each channel by itself whose kernel is as long as the text, over the real tokens of a document.

    y_t = sum_j kernel_j x_(t-j)

Shapes: x [batch, length, channels]; kernel [channels, taps]; state [batch, channels, tokens], the real
tokens of the document so far, the newest first, zero where there are fewer: at most taps - 1; documents [batch, length]
as in `documents.py`, an initial state belongs to document 1.

One Fourier transform over a text would be causal only up to rounding, which spreads over all that it sees: a large
number would be felt before it is read. Here no transform that gives an output has seen a later input. A text is cut
into blocks, 4 to a group, groups being the blocks of the next level; a transform takes what a block adds to the later
ones of its group, and matrix products what the 64 tokens of the smallest blocks add to each other (relaxed
multiplication: van der Hoeven, 2002, "Relax, but don't be too lazy"). The sizes are the same for texts of all lengths,
and with them the transforms of a kernel, which may be kept: `KernelTransform`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .documents import document_runs, document_steps, find_documents
from .precision import without_autocast

SMALLEST, GROUP = 64, 4  # tokens of the smallest blocks; blocks of a group


class KernelTransform(NamedTuple):
    """What `long_convolution` needs of a kernel [channels, taps], for texts of up to `tokens`."""

    within: torch.Tensor  # [channels, SMALLEST, SMALLEST] from each token of a smallest block to the later ones
    across: tuple[torch.Tensor, ...]  # of each level [channels, GROUP - 1, size + 1]: 1, 2 and 3 blocks further

    @property
    def tokens(self) -> int:
        return SMALLEST * GROUP ** len(self.across)


def transform_kernel(kernel: torch.Tensor, tokens: int) -> KernelTransform:
    """Of kernel [channels, taps], in float32 at least, for texts of up to `tokens`."""
    kernel = kernel.to(torch.promote_types(kernel.dtype, torch.float32))[:, :tokens]
    # Row j of a Toeplitz matrix begins j tokens before the kernel does, with zeros
    within = F.pad(kernel[:, :SMALLEST], (SMALLEST, max(0, SMALLEST - kernel.shape[1])))
    within = within.unfold(-1, SMALLEST, 1)[:, 1:].flip(1)
    across = []
    size = SMALLEST
    while size < tokens:
        reach = min(GROUP, -(-tokens // size))
        pieces = F.pad(kernel[:, : reach * size], (0, max(0, reach * size - kernel.shape[1])))
        across.append(torch.fft.rfft(pieces.unfold(-1, 2 * size, size)))
        size *= GROUP
    return KernelTransform(within, tuple(across))


def causal_blocks(x: torch.Tensor, transform: KernelTransform) -> torch.Tensor:
    """The convolution of x [channels, rows, length], which holds no text after another."""
    channels, rows, length = x.shape
    levels = [SMALLEST * GROUP**level for level in range(len(transform.across)) if SMALLEST * GROUP**level < length]
    largest = max([SMALLEST, *levels])
    x = F.pad(x, (0, -length % largest))
    smallest = x.reshape(channels, rows * x.shape[-1] // SMALLEST, SMALLEST)
    y = torch.bmm(smallest, transform.within).view_as(x)
    for size, kernel in zip(levels, transform.across, strict=False):
        blocks = min(GROUP, -(-length // size))
        read = torch.fft.rfft(x.unflatten(-1, (-1, blocks, size))[..., :-1, :], n=2 * size)
        made = read * kernel[:, None, None, :1]
        for further in range(1, blocks - 1):
            made[..., further:, :].addcmul_(read[..., :-further, :], kernel[:, None, None, further, None])
        y.unflatten(-1, (-1, blocks, size))[..., 1:, :].add_(torch.fft.irfft(made, n=2 * size)[..., size:])
    return y[..., :length]


def fast_length(least: int) -> int:
    """The next even product of twos, threes and fives, the lengths that Fourier transforms are quick at."""
    length = max(2, least + least % 2)
    while True:
        rest = length
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return length
        length += 2


class CausalConvolution(torch.autograd.Function):
    """`causal_blocks` of x [channels, rows, length] and kernel [channels, taps], which keeps these alone for backward.
    A gradient need not be causal to the last bit: there, whole texts are transformed."""

    @staticmethod
    def forward(ctx, x, kernel, *ready):
        ctx.save_for_backward(x, kernel)
        return causal_blocks(
            x, KernelTransform(ready[0], ready[1:]) if ready else transform_kernel(kernel, x.shape[-1])
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, kernel = ctx.saved_tensors
        if not x.numel():  # a batch of padding alone
            return x, torch.zeros_like(kernel), *(None for _ in ctx.needs_input_grad[2:])
        length, of_x, of_kernel = x.shape[-1], None, None
        size = fast_length(2 * length)
        wanted = torch.fft.rfft(gradient, n=size)
        if ctx.needs_input_grad[0]:
            spread = torch.fft.rfft(kernel[:, :length], n=size).conj()[:, None]
            of_x = torch.fft.irfft(wanted * spread, n=size)[..., :length]
        if ctx.needs_input_grad[1]:
            seen = torch.fft.rfft(x, n=size).conj()
            taps = torch.fft.irfft((wanted * seen).sum(1), n=size)[:, :length]
            of_kernel = F.pad(taps, (0, kernel.shape[1] - taps.shape[1]))  # it also cuts
        return of_x, of_kernel, *(None for _ in ctx.needs_input_grad[2:])


def recurrent_long_convolution(
    x, kernel, *, documents=None, initial_state=None, output_final_state=False, transform=None
):
    """The definition above, one step at a time. The reference for tests, and the decoding step."""
    wide, kept = torch.promote_types(x.dtype, torch.float32), kernel.shape[1] - 1
    with without_autocast(x):
        k = kernel.to(wide)
        state = x.new_zeros(len(x), x.shape[2], 0) if initial_state is None else initial_state.to(x.dtype)
        if documents is not None:
            real, starts = document_steps(documents)
        outputs = []
        for t in range(x.shape[1]):
            before = state[..., :kept] if documents is None else state[..., :kept] * ~starts[:, t, None, None]
            far = torch.einsum("bct,ct->bc", before.to(wide), k[:, 1 : before.shape[-1] + 1])
            outputs.append(torch.addcmul(far, x[:, t].to(wide), k[:, 0]))
            after = torch.cat((x[:, t, :, None], before), dim=-1)[..., :kept]
            passed = F.pad(state, (0, 1))[..., :kept]
            state = after if documents is None else torch.where(real[:, t, None, None], after, passed)
    return torch.stack(outputs, dim=1).to(x.dtype), state if output_final_state else None


def long_convolution(x, kernel, *, documents=None, initial_state=None, output_final_state=False, transform=None):
    """The same answer in parallel. `transform` is the kernel's where it is ready, for texts at least as long as x with
    its state."""
    length, wide = x.shape[1], torch.promote_types(x.dtype, torch.float32)
    if initial_state is not None:
        x = torch.cat((initial_state.to(x.dtype).flip(-1).transpose(1, 2), x), dim=1)
        documents = None if documents is None else F.pad(documents, (x.shape[1] - length, 0), value=1)
    found = None if documents is None else find_documents(documents)
    rows = x if found is None else found.unpack(x)
    with without_autocast(x):
        # Of two dimensions, a transposed copy is quick
        row, k = rows.flatten(0, 1).T.contiguous().to(wide).unflatten(1, rows.shape[:2]), kernel.to(wide)
        y = CausalConvolution.apply(row, k, *(() if transform is None else (transform.within, *transform.across)))
    y = y.flatten(1).to(x.dtype).T.contiguous().view_as(rows)
    y = y if found is None else found.repack(y, *x.shape[:2])
    return y[:, x.shape[1] - length :], last_read(x, documents, kernel.shape[1] - 1) if output_final_state else None


def last_read(x: torch.Tensor, documents: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """The real tokens [batch, channels, tokens or less] of the last document of x [batch, length, channels], the newest
    first."""
    if documents is not None:
        real, document = document_runs(documents, x)
        kept = real & (document == document[:, -1:])
        order = torch.argsort(kept.long(), dim=1, stable=True)  # these last
        x = x.gather(1, order[..., None].expand_as(x)) * kept.gather(1, order)[..., None]
    return x[:, max(0, x.shape[1] - tokens) :].flip(1).transpose(1, 2)
