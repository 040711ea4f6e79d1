import math

import torch


def initial_step_bias(count: int, low: float, high: float, floor: float) -> torch.Tensor:
    """[count] numbers whose softplus is even in its logarithm between `low` and `high`, and at least `floor`: how the
    state spaces of Mamba begin (Gu and Dao, 2023, arXiv:2312.00752, section 3.6)."""
    step = torch.exp(torch.rand(count) * math.log(high / low) + math.log(low)).clamp(min=floor)
    return step + torch.log(-torch.expm1(-step))
