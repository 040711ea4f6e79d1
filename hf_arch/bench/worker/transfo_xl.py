"""The Transformer-XL that transformers had until 4.57: of 4.36, the last but a few that runs."""

import importlib

import torch

from .subject import Subject

SEGMENT = 512  # and its memory: what ours has by default


class TransfoXL(Subject):
    """A text is read segment by segment: in one piece, all of it would be one segment."""

    def __init__(self, shape: dict, longest: int, **options):
        peer = importlib.import_module("transformers.models.deprecated.transfo_xl")
        size, heads = shape["hidden_size"], shape["num_attention_heads"]
        config = peer.configuration_transfo_xl.TransfoXLConfig(
            vocab_size=shape["vocab_size"],
            d_model=size,
            d_embed=size,
            n_head=heads,
            d_head=size // heads,
            d_inner=shape["intermediate_size"],
            n_layer=shape["num_hidden_layers"],
            mem_len=SEGMENT,
            same_length=False,
            clamp_len=-1,
            cutoffs=[],
            div_val=1,
            tie_projs=[False],
            dropout=0.0,
        )
        self.model = peer.modeling_transfo_xl.TransfoXLLMHeadModel(config)

    def read(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        weight = self.model.crit.out_layers[0].weight
        memory, logits = [weight.new_zeros(0, len(ids), weight.shape[1])] * self.model.config.n_layer, []
        for piece in ids.split(SEGMENT, dim=1):
            answer = self.model(piece, mems=memory)
            memory = answer.mems
            logits.append(answer.prediction_scores)
        return torch.cat(logits, dim=1), memory

    def logits(self, ids):
        return self.read(ids)[0]

    def begin(self, ids, room):
        return self.read(ids)[1]

    def step(self, token, memory):
        return self.model(token, mems=memory).mems
