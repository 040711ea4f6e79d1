"""What a hierarchy of segments answers: its tokens, and representations of its segments and documents."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, ModelOutput

from ..layers.segments import Segmentation
from ..skeleton.config import ArchConfig


@dataclass
class SegmentedOutput(BaseModelOutputWithPoolingAndCrossAttentions):
    """
    pooler_output [documents, size]:
        What speaks for each document, by `config.document_pooling`. There is a document per row, unless rows are
        packed.
    segment_embeddings [documents, segments, size], segment_mask [documents, segments]:
        The leaders of level 0, zero past a document's last segment; 1 where there is one.
    level_embeddings [documents, levels, segments, size], level_masks [documents, levels, segments]:
        The same of every level but the last, from the lowest: those of sentences, of paragraphs, ...; with places for
        as many segments as level 0 has.
    router_logits, router_choices:
        Of sparse feed-forwards, over the members of their level; as in `CausalLMOutput`.
    """

    segment_embeddings: torch.FloatTensor | None = None
    segment_mask: torch.LongTensor | None = None
    level_embeddings: torch.FloatTensor | None = None
    level_masks: torch.LongTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    router_choices: tuple[torch.LongTensor, ...] | None = None


def largest(found: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return found.masked_fill(~real[..., None], torch.finfo(found.dtype).min).amax(dim=1)


def leading(found: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    return found[:, 0]


DOCUMENT_POOLS = {"max": largest, "leader": leading}


def with_embeddings(config: ArchConfig, outputs: ModelOutput, text: Segmentation, **told) -> SegmentedOutput:
    """What the layers answered, and what it says of segments and documents; `told` in the place of what they did."""
    found, masks, most = [], [], text.leaders(0).longest
    for level in range(max(1, config.num_levels - 1)):
        leaders = text.leaders(level)
        rows, real = leaders.unpack(outputs.last_hidden_state), leaders.real
        real = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device) if real is None else real
        missing = most - real.shape[1]
        found.append(nn.functional.pad(rows, (0, 0, 0, missing)))
        masks.append(nn.functional.pad(real, (0, missing)))
    fields = ("last_hidden_state", "hidden_states", "attentions", "cross_attentions", "router_logits", "router_choices")
    answered = {name: outputs.get(name) for name in fields} | told
    answered.setdefault("pooler_output", DOCUMENT_POOLS[config.document_pooling](found[0], masks[0]))
    return SegmentedOutput(
        segment_embeddings=found[0],
        segment_mask=masks[0].long(),
        level_embeddings=torch.stack(found, dim=1),
        level_masks=torch.stack(masks, dim=1).long(),
        **answered,
    )
