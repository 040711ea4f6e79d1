"""torchscale's RetNet, with the chunks that it is fastest with."""

import importlib
import sys
from unittest.mock import MagicMock

import torch

from .subject import Subject

ABSENT = ("fairscale", "fairscale.nn", "timm", "timm.models", "timm.models.layers", "einops")  # imported, never called


class RetNet(Subject):
    """Trained and run in chunks, decoded by its recurrence: the two cannot be joined, so that a decoding memory is
    that of one token at the end of the context. A step costs the same."""

    def __init__(self, shape: dict, longest: int, **options):
        sys.modules |= {name: MagicMock() for name in ABSENT}
        config = importlib.import_module("torchscale.architecture.config").RetNetConfig(
            decoder_embed_dim=shape["hidden_size"],
            decoder_value_embed_dim=2 * shape["hidden_size"],
            decoder_retention_heads=shape["num_attention_heads"],
            decoder_ffn_embed_dim=shape["intermediate_size"],
            decoder_layers=shape["num_hidden_layers"],
            vocab_size=shape["vocab_size"],
            activation_fn="swish",
            chunkwise_recurrent=True,
            recurrent_chunk_size=256,
        )
        embedding = torch.nn.Embedding(config.vocab_size, config.decoder_embed_dim)
        self.model = importlib.import_module("torchscale.architecture.retnet").RetNetDecoder(config, embedding)

    def logits(self, ids):
        self.model.chunkwise_recurrent = True
        return self.model(ids)[0]

    def begin(self, ids, room):
        tokens = torch.cat((ids, ids.new_zeros(1, room)), dim=1)
        return self.advance(tokens, ids.shape[1], {})

    def step(self, token, memory):
        tokens, length, states = memory
        tokens[:, length] = token[:, 0]
        return self.advance(tokens, length + 1, states)

    def advance(self, tokens: torch.Tensor, length: int, states: dict) -> tuple[torch.Tensor, int, dict]:
        self.model.chunkwise_recurrent = False
        self.model(tokens[:, :length], incremental_state=states)
        return tokens, length, states
