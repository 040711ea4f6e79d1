"""Attention within buckets, beside `test_recurrences.py`: who sees whom, and what it costs."""

import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from hf_arch.modeling.ops.bucketed_attention import bucketed_attention, recurrent_bucketed_attention

EXACT = {"atol": 1e-11, "rtol": 1e-10}


def some_inputs(length, num_buckets, rounds=1, heads=3, batch=2, of_heads=None):
    generator = torch.Generator().manual_seed(length)
    query, key = torch.randn(2, batch, length, heads, 8, generator=generator, dtype=torch.float64)
    value = torch.randn(batch, length, heads, 6, generator=generator, dtype=torch.float64)
    shape = (batch, length, heads if of_heads is None else of_heads, rounds)
    return query, key, value, torch.randint(num_buckets, shape, generator=generator)


def by_pairs(query, key, value, buckets, block, sees_itself, documents):
    """The definition by a count of how often each query sees each key."""
    batch, length, heads = query.shape[:3]
    seen = torch.zeros(batch, heads, length, length, dtype=torch.float64)
    for row, head, turn in ((b, h, r) for b in range(batch) for h in range(heads) for r in range(buckets.shape[3])):
        ranks, arrived = [], {}
        for t in range(length):
            bucket = (int(documents[row, t]), int(buckets[row, t, min(head, buckets.shape[2] - 1), turn]))
            ranks.append((bucket, arrived.get(bucket, 0) // block))
            arrived[bucket] = arrived.get(bucket, 0) + 1
        for i in range(length):
            for j in range(i + 1):
                seen[row, head, i, j] += ranks[i][0] == ranks[j][0] and ranks[i][1] - ranks[j][1] <= 1
    if not sees_itself:
        others = seen - seen * torch.eye(length, dtype=torch.float64)
        seen = torch.where(others.sum(-1, keepdim=True) > 0, others, seen)
    scores = torch.einsum("bihd,bjhd->bhij", query, key) + seen.log()
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), value)


@pytest.mark.parametrize("sees_itself", [True, False])
@pytest.mark.parametrize("block, num_buckets, rounds, of_heads", [(3, 4, 3, None), (5, 1, 1, 1), (40, 2, 1, None)])
def test_a_token_sees_its_block_and_the_one_before(block, num_buckets, rounds, of_heads, sees_itself):
    inputs = some_inputs(31, num_buckets, rounds, of_heads=of_heads)
    documents = torch.ones(2, 31, dtype=torch.long)
    documents[0, 20:] = 2
    expected = by_pairs(*inputs, block, sees_itself, documents)
    for form in (recurrent_bucketed_attention, bucketed_attention):
        options = {"num_buckets": num_buckets, "block": block, "sees_itself": sees_itself}
        assert_close(form(*inputs, documents=documents, **options)[0], expected, **EXACT)


def test_one_bucket_and_a_block_of_all_is_full_attention():
    query, key, value, buckets = some_inputs(150, 1)
    output, _ = bucketed_attention(query, key, value, buckets, num_buckets=1, block=150)
    told = (x.transpose(1, 2) for x in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(*told, is_causal=True, scale=1.0)
    assert_close(output, expected.transpose(1, 2), **EXACT)


@pytest.mark.parametrize("later", [False, True])
def test_a_few_tokens_of_few_buckets_go_on_where_a_text_stopped(later):
    *tensors, buckets = some_inputs(40, 9, 2)
    buckets[:, 30:] = 1
    documents = (torch.arange(40) > 33).long().expand(2, -1) + 1 if later else None
    options = {"num_buckets": 9, "block": 3, "documents": documents, "output_final_state": True}
    expected, last = recurrent_bucketed_attention(*tensors, buckets, **options)
    options["documents"] = None
    _, state = bucketed_attention(*(x[:, :30] for x in tensors), buckets[:, :30], **options)
    options["documents"] = documents[:, 30:] if later else None
    output, state = bucketed_attention(*(x[:, 30:] for x in tensors), buckets[:, 30:], initial_state=state, **options)
    assert_close(output, expected[:, 30:], **EXACT)
    assert_close(state, last, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_answers_are_as_narrow_as_the_values_and_close(dtype):
    *tensors, buckets = some_inputs(130, 3, 2)
    options = {"num_buckets": 3, "block": 8, "sees_itself": False}
    expected, _ = recurrent_bucketed_attention(*tensors, buckets, **options)
    for form in (recurrent_bucketed_attention, bucketed_attention):
        output, state = form(*(x.to(dtype) for x in tensors), buckets, output_final_state=True, **options)
        assert output.dtype == state[0].dtype == dtype
        assert (output - expected).std() < 10 * torch.finfo(dtype).eps


def cost(length, **options):
    """(operations, numbers of the largest tensor) of one call, forward and backward."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
            sizes.extend(x.untyped_storage().nbytes() for x in made)
            return out

    *tensors, buckets = some_inputs(length, options["num_buckets"], 2, heads=2, batch=1)
    tensors = [x.float().requires_grad_() for x in tensors]
    with FlopCounterMode(display=False) as counter, Watch():
        bucketed_attention(*tensors, buckets, **options)[0].sum().backward()
    return counter.get_total_flops(), max(sizes)


@pytest.mark.parametrize("num_buckets", [2, 5000])
def test_work_and_memory_are_linear_and_do_not_depend_on_the_number_of_buckets(num_buckets):
    short, long = (cost(length, num_buckets=num_buckets, block=16) for length in (512, 4096))
    for few, many in zip(short, long, strict=True):
        assert math.log(many / few, 8) < 1.02
    assert long == cost(4096, num_buckets=64, block=16)
    pairs = 4096 * 2 * 2 * (64 + 2 * 16)  # a chunk, and the two blocks before it, for each head and round
    assert long[0] <= 6 * pairs * (8 + 6) and long[1] <= 4 * pairs


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_steps_write_into_the_state_and_say_the_same(padded):
    *tensors, buckets = some_inputs(40, 5, 2)
    documents = torch.ones(2, 40, dtype=torch.long)
    documents[1, 3:9] = documents[0, 33:35] = 0 if padded else 1
    options = {"num_buckets": 5, "block": 3, "output_final_state": True}
    expected, last = recurrent_bucketed_attention(*tensors, buckets, documents=documents, **options)
    state, outputs = None, []
    for parts in zip(*(x.split(1, dim=1) for x in (*tensors, buckets, documents)), strict=True):
        before, told = state, {"documents": parts[-1] if padded else None, "in_place": state is not None}
        output, state = recurrent_bucketed_attention(*parts[:-1], initial_state=before, **told, **options)
        outputs.append(output)
        assert before is None or state[0] is before[0]
    real = documents > 0
    assert_close(torch.cat(outputs, dim=1)[real], expected[real], **EXACT)
    assert_close(state, last, **EXACT)
