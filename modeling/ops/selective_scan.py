"""The selective state space of Mamba (Gu and Dao, 2023, arXiv:2312.00752, equation 2 and algorithm 2): every channel
has states of its own, whose decays and inputs each token sets.

    state_t = exp(step_t A) * state_(t-1) + key_t (step_t x_t)          out_t = query_t state_t

Shapes: x, step [batch, length, channels], step 0 or more; A [states, channels], negative; key and query, B and C of the
paper, [batch, length, states]; state [batch, states, channels], in float32 at least; documents [batch, length] as in
`documents.py`: padding adds nothing and fades nothing, the state is forgotten where a document starts, an initial state
belongs to document 1.
"""

import functools

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .dispatch import accelerated, compiled
from .documents import document_steps
from .precision import without_autocast

SIZE, ROWS = 4, 8  # steps made one after another, and how many such rows lie side by side: what stays in a cache
BLOCK = SIZE * ROWS  # tokens whose states exist at once: channels * states numbers for each


def recurrent_selective_scan(x, step, A, key, query, *, documents=None, initial_state=None, output_final_state=False):
    """The definition above, one step at a time. The reference for tests, and the decoding step."""
    with without_autocast(x):
        A, state, added, step, key, query, keep = prepared(x, step, A, key, query, documents, initial_state)
        key, outputs = key.mT, []
        for t in range(x.shape[1]):
            now = slice(t, t + 1)
            decay = torch.exp(step[:, now] * A)
            if keep is not None:
                decay = decay * keep[:, now]
            state = (decay * state).addcmul_(key[..., now], added[:, now])
            outputs.append(query[:, now] @ state)
    output = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
    return output.to(x.dtype), state if output_final_state else None


def mamba_selective_scan(
    selective_scan, x, step, A, key, query, *, documents=None, initial_state=None, output_final_state=False
):
    """mamba-ssm's kernel has time last. It begins with no state, knows no documents but padding, and lets no gradient
    through its final state."""
    trained = output_final_state and torch.is_grad_enabled()
    if trained or initial_state is not None or (documents is not None and documents.max() > 1):
        return NotImplemented
    if documents is not None:
        step = step * (documents > 0)[..., None]
    added, step, key, query = (tensor.float().mT.contiguous() for tensor in (x, step, key, query))
    found = selective_scan(added, step, A.float().T.contiguous(), key, query, return_last_state=output_final_state)
    output, state = found if output_final_state else (found, None)
    return output.mT.to(x.dtype), None if state is None else state.mT


@accelerated("mamba_ssm.ops.selective_scan_interface:selective_scan_fn", adapt=mamba_selective_scan, packs=False)
def chunk_selective_scan(x, step, A, key, query, *, documents=None, initial_state=None, output_final_state=False):
    """The same answer a block at a time, steps of a block side by side."""
    with without_autocast(x):
        output, state = SelectiveScan.apply(*prepared(x, step, A, key, query, documents, initial_state))
    return output.to(x.dtype), state if output_final_state else None


def prepared(x, step, A, key, query, documents, state) -> tuple[torch.Tensor | None, ...]:
    """Everything wide: A, the initial state, what is added, steps of 0 at padding, key, query; and whether the state
    goes on at each token [batch, length, 1], None where it always does."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, step, A, key, query = (tensor.to(wide) for tensor in (x, step, A, key, query))
    keep = None
    if documents is not None:
        real, starts = document_steps(documents)
        step = step * real[..., None]
        keep = (~starts)[..., None].to(wide)
    if state is None:
        state = x.new_zeros(x.shape[0], *A.shape)
    return A, state, step * x, step, key, query, keep


class ScanBlocks:
    """A sequence cut into blocks of rows of steps; what is made of a block takes the place of what was made of another.

    A block works in two turns, each a loop over the steps of all its rows at once: first what a row adds up by itself,
    which gives the states between rows, then all steps again from there.
    """

    def __init__(self, size, A, added, step, key, query, keep):
        self.A, self.length = A, added.shape[1]
        self.size = min(size, self.length)
        self.rows = min(ROWS, -(-self.length // self.size))
        self.added, self.step = (self.cut(tensor)[..., None, :] for tensor in (added, step))
        self.key, self.query = (self.cut(tensor)[..., None] for tensor in (key, query))
        self.keep = None if keep is None else self.cut(keep, value=1.0)[..., None]
        shape = self.size, self.rows, len(added), *A.shape
        self.decay, self.states = A.new_empty(shape), A.new_empty(shape)
        self.across, self.alone, self.before = (A.new_empty(shape[1:]) for _ in range(3))
        self.of_step = self.decay.unbind(0), self.states.unbind(0)
        self.of_row = [tensor.unbind(0) for tensor in (self.alone, self.across, self.before)]

    def cut(self, tensor: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        """[batch, length, n] -> [blocks, size, rows, batch, n]; past the end are steps of 0 that go on."""
        if pad := -self.length % (self.size * self.rows):
            tensor = F.pad(tensor, (0, 0, 0, pad), value=value)
        return tensor.unflatten(1, (-1, self.rows, self.size)).permute(1, 3, 2, 0, 4)

    def joined(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        """[size, rows, batch, 1, n] of each block -> [batch, length, n]."""
        return torch.stack(pieces).squeeze(-2).permute(3, 0, 2, 1, 4).flatten(1, 3)[:, : self.length]

    def run(self, n: int, state: torch.Tensor) -> torch.Tensor:
        """Fill `states` with those after each step of block n; the last one."""
        torch.mul(self.step[n], self.A, out=self.decay).exp_()
        torch.mul(self.step[n].sum(0), self.A, out=self.across).exp_()
        if self.keep is not None:
            self.decay.mul_(self.keep[n])
            self.across.mul_(self.keep[n].prod(0))
        decays, states = self.of_step
        steps = list(zip(decays, self.key[n], self.added[n], states, strict=True))
        _, key, added, _ = steps[0]
        alone = torch.mul(key, added, out=self.alone)
        for decay, key, added, _ in steps[1:]:
            alone.mul_(decay).addcmul_(key, added)
        held = self.carry(range(self.rows), state)
        for decay, key, added, into in steps:
            held = torch.mul(decay, held, out=into).addcmul_(key, added)
        return held[-1].clone()

    def run_back(self, n: int, grad: torch.Tensor, grads: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
        """Fill `grads` with the gradient of the state after each step, given those of the outputs, `grad`, and of the
        last state, `later`; that of the state before the block. After `run`, in the same two turns from the end."""
        steps = list(zip(self.of_step[0], self.query[n], grad, grads, strict=True))[::-1]
        decay, query, of_output, _ = steps[0]
        alone = torch.mul(query, of_output, out=self.alone).mul_(decay)
        for decay, query, of_output, _ in steps[1:]:
            alone.addcmul_(query, of_output).mul_(decay)
        held = self.carry(range(self.rows)[::-1], later)
        for decay, query, of_output, into in steps:
            torch.mul(torch.addcmul(held, query, of_output, out=into), decay, out=held)
        return held[0].clone()

    def carry(self, rows: range, state: torch.Tensor) -> torch.Tensor:
        """What comes to each row from the one before it, by what rows do alone."""
        alone, across, before = self.of_row
        before[rows[0]].copy_(state)
        for row, following in zip(rows, rows[1:], strict=False):
            torch.addcmul(alone[row], across[row], before[row], out=before[following])
        return self.before


def run_blocks(size, A, state, *sequences) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The output, the final state, and the states at the starts of blocks."""
    blocks, outputs, starts = ScanBlocks(size, A, *sequences), [], []
    for n, query in enumerate(blocks.query):
        starts.append(state)
        state = blocks.run(n, state)
        outputs.append(query.transpose(-1, -2) @ blocks.states)
    return blocks.joined(outputs), state, starts


def run_compiled(code, A, state, *sequences) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The same by the machine code of `steps_in_order`, which is of blocks of one size."""
    length, outputs, starts = sequences[0].shape[1], [], []
    A, state, pad = A.T.contiguous(), state.mT.contiguous(), (0, 0, 0, -length % BLOCK)
    *sequences, keep = sequences
    sequences = [F.pad(tensor, pad) for tensor in sequences]
    keep = None if keep is None else F.pad(keep, pad, value=1.0)
    for start in range(0, length, BLOCK):
        starts.append(state.mT)
        piece = [None if tensor is None else tensor[:, start : start + BLOCK] for tensor in (*sequences, keep)]
        output, state = code(A, state, *piece)
        outputs.append(output)
    return torch.cat(outputs, dim=1)[:, :length], state.mT, starts


def steps_in_order(A, state, added, step, key, query, keep=None) -> tuple[torch.Tensor, torch.Tensor]:
    """A few steps one after another, to be compiled: with the states of a channel side by side, all that is made of it
    stays in registers. `A` and `state` are [..., channels, states]."""
    outputs = []
    for t in range(added.shape[1]):
        decay = torch.exp(step[:, t, :, None] * A)
        if keep is not None:
            decay = decay * keep[:, t, :, None]
        state = decay * state + added[:, t, :, None] * key[:, t, None]
        outputs.append((state * query[:, t, None]).sum(-1))
    return torch.stack(outputs, dim=1), state


class SelectiveScan(torch.autograd.Function):
    """(output, final state). Of all states, only those between blocks are kept for backward, which makes the others
    again."""

    @staticmethod
    def forward(ctx, A, state, *sequences):
        ctx.size = 4 * SIZE if torch.compiler.is_compiling() else SIZE  # fewer operations for a compiler to look at
        code = compiled(steps_in_order, A)
        run = functools.partial(run_blocks, ctx.size) if code is None else functools.partial(run_compiled, code)
        output, state, starts = run(A, state, *sequences)
        ctx.save_for_backward(A, *sequences, *starts)
        return output, state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, later):
        A, *kept = ctx.saved_tensors
        sequences, starts = kept[:5], kept[5:]
        with without_autocast(grad):
            blocks, of_A, found = ScanBlocks(ctx.size, A, *sequences), torch.zeros_like(A), []
            grads = torch.empty_like(blocks.states)
            grad = blocks.cut(grad)[..., None, :]
            over_states, over_steps = A.new_ones(1, len(A)), A.new_ones(1, blocks.states[..., 0, 0].numel())
            for n in reversed(range(len(grad))):
                blocks.run(n, starts[n])
                of_query = grad[n] @ blocks.states.transpose(-1, -2)
                later = blocks.run_back(n, grad[n], grads, later)
                of_key = blocks.added[n] @ grads.transpose(-1, -2)
                of_added = blocks.key[n].transpose(-1, -2) @ grads
                # of the exponents: what was left of the state before, times the gradient of the state after
                powers = blocks.states.addcmul_(blocks.key[n], blocks.added[n], value=-1).mul_(grads)
                of_step = over_states @ torch.mul(powers, A, out=grads)
                of_A += (over_steps @ powers.mul_(blocks.step[n]).flatten(0, 2).flatten(1)).view_as(A)
                found.append((of_added, of_step, of_key, of_query))
        return of_A, later, *(blocks.joined(pieces[::-1]) for pieces in zip(*found, strict=True)), None
