"""What layers of `PatternAttention` are told: whole texts, of which they compare only what their pattern shows, or a
mask of the definition where something is cached."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers.utils.import_utils import is_tracing

from ..layers.pattern_attention import ChosenKeys, PatternAttention, WholeTexts
from ..ops.documents import document_numbers, document_places
from .masks import number_documents


def pattern_mask(mixer: type[PatternAttention]) -> Callable:
    """The maker of the masks of a layer type."""

    def make(
        config, inputs_embeds, attention_mask=None, past_key_values=None, position_ids=None, layer_idx=0, **kwargs
    ):
        if attention_mask is not None and attention_mask.ndim != 2:
            return attention_mask
        told = {"attention_mask": attention_mask, "past_key_values": past_key_values, "position_ids": position_ids}
        growing = past_key_values is not None and not past_key_values.is_compileable
        fresh = past_key_values is None or growing and past_key_values.get_seq_length() == 0
        asked = kwargs.get("output_attentions") or config.output_attentions
        if fresh:
            documents = number_documents(config, inputs_embeds, **told)
            if not asked:
                return WholeTexts(documents)
        else:
            documents = cached_documents(inputs_embeds, attention_mask, past_key_values, layer_idx)
        documents = document_numbers(documents, inputs_embeds)
        seen = 0 if fresh else past_key_values.get_seq_length()
        columns = seen + torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        count = shown_among(mixer, config, documents, columns)
        if growing and not asked and not is_tracing(count):
            some = count.flatten(0, 2).any(0).nonzero().squeeze(-1)
            if 2 * len(some) < count.shape[-1]:
                return ChosenKeys(some, count[..., some].to(inputs_embeds.dtype).log())
        return count.to(inputs_embeds.dtype).log()

    return make


def cached_documents(inputs_embeds, attention_mask, past_key_values, layer_idx: int) -> torch.Tensor:
    """[batch, keys] 1 where a key is a real token, those to come among them. What is cached is one document."""
    keys, _ = past_key_values.get_mask_sizes(inputs_embeds.shape[1], layer_idx)
    if attention_mask is None:
        return torch.ones(inputs_embeds.shape[0], keys, dtype=torch.long, device=inputs_embeds.device)
    return F.pad(attention_mask.long(), (0, keys - attention_mask.shape[1]))


def shown_among(mixer: type[PatternAttention], config, documents: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """How often keys [batch, keys] count for the queries among them at `columns`; padding sees itself."""
    place, number = document_places(documents), documents[:, columns]
    count = mixer.shown(config, place[:, columns], place) * (number[:, :, None] == documents[:, None])[:, None]
    itself = columns[:, None] == torch.arange(documents.shape[1], device=documents.device)
    return torch.where((number == 0)[:, None, :, None], itself, count)
