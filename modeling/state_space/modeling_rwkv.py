"""What the versions of RWKV have in common."""

from torch import nn
from transformers import initialization as init

from ..skeleton.backbone import Backbone

EMBEDDING_STD = 1e-4  # of the official code: small, since a norm follows, so that embeddings soon find their directions


class RWKVBackbone(Backbone):
    norm_class = nn.LayerNorm

    def init_parameters(self, std: float) -> None:
        init.copy_(self.embed_tokens.weight, self.embed_tokens.weight * (EMBEDDING_STD / (std or 1.0)))
