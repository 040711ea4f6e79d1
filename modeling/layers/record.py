"""What `output_attentions` and `output_router_logits` collect: a value that passes through one of these is recorded."""

from torch import nn


class AttentionWeights(nn.Identity):
    pass


class RouterLogits(nn.Identity):
    pass
