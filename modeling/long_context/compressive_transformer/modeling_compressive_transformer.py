"""Compressive Transformer (Rae et al., 2019, arXiv:1911.05507): a Transformer-XL whose memory, instead of forgetting
its oldest tokens, compresses them."""

from dataclasses import dataclass
from typing import NamedTuple, Unpack

import torch
from transformers.cache_utils import Cache
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.import_utils import is_tracing

from ...layers.compression import COMPRESSIONS
from ...layers.side_loss import SideLoss
from ...ops.compressed_memory import (
    Rate,
    Slots,
    keep_slots,
    keep_slots_of_step,
    slots_of_rows,
    slots_of_state,
)
from ...ops.reconstruction import last_segments, reconstruction_error, usage_of_rows, usage_of_step
from ...ops.segment_rows import Projected, SegmentRows, SegmentState, find_rows, follow, remember
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLMOutput
from ...skeleton.loss import per_label
from ..modeling_segment_recurrence import Reading, SegmentBackbone, SegmentCausalLM, SegmentRecurrence
from .configuration_compressive_transformer import ArchCompressiveTransformerConfig


class CompressedState(NamedTuple):
    """A `SegmentState`, what its tokens were before the projections, and what is left of older ones."""

    key: torch.Tensor
    value: torch.Tensor
    read: torch.Tensor
    hidden: torch.Tensor  # [batch, window.held, 1, size]
    slot_key: torch.Tensor  # [batch, rate.slots.held, heads, dim] the last slots, right-aligned
    slot_value: torch.Tensor
    usage: torch.Tensor  # [batch, segment] the attention that what leaves next has had; empty where no one asks

    @property
    def slots(self) -> Projected:
        return self.slot_key, self.slot_value


class Past(NamedTuple):
    """What a call of a mixer sees before the memory, and what is to be kept of it."""

    slots: Slots | None
    kept: tuple[torch.Tensor, ...] | None  # the slots and the usage of the next state
    zero: torch.Tensor  # what carries the gradient of the compression


class CompressiveRecurrence(SegmentRecurrence):
    """Relative attention over a token's segment, the memory before it, and a compressed memory before that."""

    state = CompressedState

    def __init__(self, config: ArchCompressiveTransformerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.compression = COMPRESSIONS[config.compression](config)
        length, rate, unit = config.compressed_memory_length, config.compression_rate, self.compression.unit
        self.rate = Rate(self.window, length, rate, unit)

    def attend(self, read: Reading, side_loss: SideLoss | None = None, **kwargs):
        state: CompressedState | None = read.told["initial_state"]
        query, key, value, still = self.projections(read)
        hidden, seen = read.hidden_states.detach()[:, :, None], None
        if state is not None:
            hidden, seen = read.memory.follow("memory_hidden", hidden), state.read
        if state is not None and read.length == 1:
            past = self.step(read, state, query, key, hidden)
        elif state is None and read.length <= self.window.memory:  # nothing leaves
            past = Past(None, self.empty(key), self.untrained(read))
        else:
            past = self.leave(read, state, (query, key, value), side_loss)
        told = {"initial_state": state and SegmentState(*state[:3]), "slots": past.slots, "zero": past.zero}
        output, recent = self.look(read, query, key, value, still, **told)
        if recent is None:
            return output, None
        (hidden,), _ = remember((hidden,), self.window, read.told["documents"], seen)
        return output, CompressedState(*recent, hidden, *past.kept)

    def leave(self, read: Reading, state: CompressedState | None, projected, side_loss: SideLoss | None) -> Past:
        """Of whole texts, or pieces of them."""
        told = read.told
        rows = find_rows(read.hidden_states, told["documents"], state, self.window)
        hidden = read.hidden_states.detach()[:, :, None]
        hidden = rows.after_memory(rows.lay(hidden), state and state.hidden)[:, : -self.window.memory, 0]
        query, key, value = (x.detach() for x in projected)
        query, tokens = rows.lay(query), rows.lay_keys((key, value), state)
        usage, left = None, self.empty(key)[-1]
        if self.compression.by_use:
            usage = self.usage(query, tokens[0], rows, state)
            left = rows.keep(last_segments(usage, rows), state and state.usage)
        units = hidden.unflatten(1, (-1, self.compression.unit))
        made = self.compression(units, usage).flatten(1, 2)
        pair = tuple(self.project(name, made.detach()) for name in ("k_proj", "v_proj"))
        slots, kept, zero = slots_of_rows(pair, rows, state and state.slots, self.rate), None, self.untrained(read)
        if told["output_final_state"]:
            kept = *keep_slots(slots, rows, state and state.slots), left
        if side_loss is not None:
            frozen = tuple(self.project_frozen(name, made) for name in ("k_proj", "v_proj"))
            zero = zero + side_loss.attach(read.layer_idx, *reconstruction_error(query, tokens, frozen, rows))
        return Past(slots, kept, zero)

    def step(self, read: Reading, state: CompressedState, query, key, hidden: torch.Tensor) -> Past:
        """Of one more token; `hidden` is what the state holds, and the token."""
        documents, segment, unit = read.told["documents"], self.window.segment, self.compression.unit
        real = torch.ones_like(state.read, dtype=torch.bool) if documents is None else documents[:, 0] > 0
        after, seen = state.read + real, slots_of_state(state.slots, state.read, self.rate)
        units, usage, left = hidden[:, None, segment - unit : segment, 0], None, state.usage
        if self.compression.by_use:
            used = usage_of_step(query, follow(state.key, key), state.read, segment)
            left = torch.where(real[:, None], left + used, left)
            usage, left = left[:, None], left * (after % segment > 0)[:, None]
        ends = real & (after % unit == 0)
        if ends.device.type == "cpu" and not is_tracing(ends) and not ends.any():
            return Past(seen, (*state.slots, left), self.untrained(read))
        made = self.compression(units, usage).flatten(1, 2)
        pair = tuple(self.project(name, made.detach()) for name in ("k_proj", "v_proj"))
        return Past(seen, (*keep_slots_of_step(pair, state.slots, ends), left), made[:0].sum())

    def empty(self, key: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The slots and the usage of a state after which nothing has left."""
        batch, _, *heads = key.shape
        slots = (key.new_zeros(batch, self.rate.slots.held, *heads) for _ in range(2))
        return *slots, key.new_zeros(batch, self.window.segment if self.compression.by_use else 0)

    def untrained(self, read: Reading) -> torch.Tensor:
        """Zero, made by all that the compression consists of: DistributedDataParallel waits for its gradients, also
        where nothing is compressed, or no one asks for its loss."""
        if not torch.is_grad_enabled():
            return read.hidden_states.new_zeros(())
        unit = read.hidden_states.new_zeros(1, self.compression.unit, read.hidden_states.shape[-1])
        return self.compression(unit, unit[..., 0])[:0].sum()

    def usage(self, query: torch.Tensor, key: torch.Tensor, rows: SegmentRows, state: CompressedState | None):
        """[rows, segments, segment], with what the tokens of an earlier call did."""
        usage = usage_of_rows(query, key, rows)
        if state is None:
            return usage
        before = state.usage[rows.aligned.batch_row] * rows.continued[:, None]
        return torch.cat((usage[:, :1] + before[:, None], usage[:, 1:]), dim=1)

    def project_frozen(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """As `project`, but only x gets a gradient."""
        module = getattr(self, name)
        weights = {name: weight.detach() for name, weight in module.named_parameters()}
        return torch.func.functional_call(module, weights, (x,)).unflatten(-1, (self.num_heads, -1))


@dataclass
class CompressiveCausalLMOutput(CausalLMOutput):
    """`compression_loss`: what the compression loses, the sum over the layers; None where it was not asked for."""

    compression_loss: torch.FloatTensor | None = None


class ArchCompressiveTransformerModel(SegmentBackbone):
    config: ArchCompressiveTransformerConfig
    mixers = {"compressive_recurrence": CompressiveRecurrence}


class ArchCompressiveTransformerForCausalLM(SegmentCausalLM):
    config: ArchCompressiveTransformerConfig
    backbone = ArchCompressiveTransformerModel

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_compression_loss: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CompressiveCausalLMOutput:
        """
        output_compression_loss (`bool`, *optional*):
            Whether to answer with `compression_loss`, a mean over the tokens before which something leaves the memory,
            and to add its sum to the loss, over the number of labels and times `config.compression_loss_coef`. By
            default in training with labels, where the compression has parameters.
        """
        if output_compression_loss is None:
            learns = any(True for _ in self.model.layers[0].mixer.compression.parameters())
            output_compression_loss = learns and self.training and labels is not None
        side_loss = SideLoss() if output_compression_loss else None
        told = {"labels": labels, "use_cache": use_cache, "side_loss": side_loss, "return_dict": True} | kwargs
        outputs = super().forward(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **told)
        outputs = CompressiveCausalLMOutput(**outputs)
        if side_loss is not None:
            outputs.compression_loss = side_loss.mean()
            if outputs.loss is not None:
                weight = self.config.compression_loss_coef * per_label(labels, **kwargs)
                outputs.loss = side_loss.join(outputs.loss, weight)
        return outputs


class ArchCompressiveTransformerForSequenceClassification(SequenceClassification):
    config: ArchCompressiveTransformerConfig
    backbone = ArchCompressiveTransformerModel


class ArchCompressiveTransformerForTokenClassification(TokenClassification):
    config: ArchCompressiveTransformerConfig
    backbone = ArchCompressiveTransformerModel


class ArchCompressiveTransformerForQuestionAnswering(QuestionAnswering):
    config: ArchCompressiveTransformerConfig
    backbone = ArchCompressiveTransformerModel
