"""The Compressive Transformer of compressive-transformer-pytorch."""

import importlib

import torch
import torch.nn.functional as F

from .subject import Subject

SEGMENT, SLOTS, RATE = 512, 512, 4  # its memory is a segment long: what ours has by default


class Compressive(Subject):
    """Read segment by segment, without gates: the model of the paper. It makes no steps: it
    remembers whole segments. Its projections of keys and values learn nothing, from the second segment on: where it
    stops the gradient of its other loss, it stops both."""

    def __init__(self, shape: dict, longest: int, **options):
        peer = importlib.import_module("compressive_transformer_pytorch")
        self.model = peer.CompressiveTransformer(
            num_tokens=shape["vocab_size"],
            dim=shape["hidden_size"],
            depth=shape["num_hidden_layers"],
            heads=shape["num_attention_heads"],
            seq_len=SEGMENT,
            mem_len=SEGMENT,
            cmem_len=SLOTS,
            cmem_ratio=RATE,
            gru_gated_residual=False,
        )

    def read(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits, and the loss of the compression."""
        memories, logits, losses = None, [], []
        for piece in ids.split(SEGMENT, dim=1):
            answer, memories, loss = self.model(piece, memories=memories)
            logits.append(answer)
            losses.append(loss.sum())
        return torch.cat(logits, dim=1), sum(losses)

    def logits(self, ids):
        return self.read(ids)[0]

    def loss(self, ids):
        logits, loss = self.read(ids)
        return F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]) + loss
