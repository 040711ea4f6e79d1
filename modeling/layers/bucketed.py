"""How a mixer attends within buckets, and what it remembers of them."""

import torch

from ..ops.bucketed_attention import bucketed_attention, recurrent_bucketed_attention
from .cache import RecurrentCacheLayer


def attend_in_buckets(
    memory: RecurrentCacheLayer | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    buckets: torch.Tensor,
    name: str = "history",
    **options,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The op of `ops/bucketed_attention.py` where the memory says that it stopped: its definition for a single step,
    else its parallel form; `name` begins the names of what it holds. The output [batch, length, heads, dim], and what
    the memory should write, {} where there is none."""
    names = f"{name}_of_buckets", f"{name}_count"
    state = None if memory is None or memory.read(names[0]) is None else tuple(map(memory.read, names))
    options |= {"initial_state": state, "output_final_state": memory is not None}
    if state is None or query.shape[1] > 1:
        output, state = bucketed_attention(query, key, value, buckets, **options)
    else:
        options["in_place"] = memory.writable(state[0])
        output, state = recurrent_bucketed_attention(query, key, value, buckets, **options)
    return output, {} if memory is None else dict(zip(names, state, strict=True))
