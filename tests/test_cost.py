"""Promise 13: cost grows as the paper says. Operations are counted, not timed: a busy machine does not matter."""

import math

import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_arch import fork
from promises import some_tokens

LENGTHS = (512, 2048)


def exponent(cost) -> float:
    """The power of the length by which a cost grows between the two LENGTHS."""
    short, long = (cost(length) for length in LENGTHS)
    return math.log(long / short) / math.log(LENGTHS[1] / LENGTHS[0])


def tiny(case):
    return case.build(dtype=torch.float32, max_position_embeddings=4096)


def operations(model, tokens) -> int:
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(tokens, use_cache=False)
    return counter.get_total_flops()


@torch.no_grad()
def test_operations_and_memory_are_linear_in_the_length(model_case):
    model = tiny(model_case)

    def flops(length):
        return operations(model, some_tokens(1, length))

    def largest(length):  # the largest tensor that a layer makes, in numbers
        sizes = []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
                return out

        with Watch():
            model(some_tokens(1, length), use_cache=False)
        return max(sizes)

    with model_case.keeps("linear cost"):
        assert exponent(flops) < 1.05
        assert exponent(largest) < 1.05


@torch.no_grad()
def test_a_step_costs_the_same_after_a_long_context(row_case):
    model = tiny(row_case)
    model.set_attn_implementation("eager")

    def flops(length):  # of the dearest of some steps: which layers run may rest on the token
        cache, found = model(some_tokens(1, length), use_cache=True).past_key_values, []
        for token in range(3, 96, 24):
            with FlopCounterMode(display=False) as counter:
                model(torch.full((1, 1), token), past_key_values=fork(cache))
            found.append(counter.get_total_flops())
        return max(found)

    with row_case.keeps("bounded step"):
        assert exponent(flops) < 0.02
