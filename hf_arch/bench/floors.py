"""The least time that a model could take: its matrix products at the machine's rate, and its exponentials.

    floor of a pass = operations / matmul rate + exponentials / exponential rate
    floor of a step = the same, or bytes of weights and state / bandwidth where that is more, + exponentials / rate

All else (norms, rotations, gates, masks) is taken to be free, as in a perfectly fused kernel.
"""

import torch
from torch import nn

from hf_arch.bench import costs_of_hierarchies, costs_of_long_context, costs_of_recurrences  # noqa: F401, they register
from hf_arch.bench.costs import Span, cost


def on_paper(architecture, head: str, fields: dict) -> nn.Module:
    """A model without numbers, to be walked."""
    with torch.device("meta"):
        fields = fields | architecture.head_fields.get(head, {})
        return architecture.load(head)(architecture.load("Config")(**fields))


def floor_seconds(model: nn.Module, measure: str, length: int, rates: dict[str, float], number_bytes: int = 4) -> float:
    """The floor of one call of `measure` at the `rates` of a machine."""
    if measure in ("step", "generate"):
        step = cost(model, Span(1, before=length))
        products = max(step.operations / rates["matmul"], step.numbers * number_bytes / rates["bandwidth"])
        return products + step.exponentials / rates["exponential"]
    whole = cost(model, Span(length))
    # Backward takes each product's two gradients; its exponentials can be those of forward
    times = 3 if measure == "training" else 1
    return times * whole.operations / rates["matmul"] + whole.exponentials / rates["exponential"]
