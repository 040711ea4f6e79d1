"""The second skeleton: a stack inside a stack. A stage reads its level, shortens it, has the next level answer, expands
the answer and reads on. Hourglass, MegaByte and H-Net differ in how.

At each level some items fire: of what was read so far they make an item of the next level, and every item uses the
last that fired at or before it. So nothing of the future is used, and a step of decoding computes the levels above only
where an item fires. An architecture names a `Resampling` and says in its config at which level each layer works
(`HierarchyConfig`); the layers themselves are those of the first skeleton, with its slots, all in one list in order of
execution, so that caches, adapters and sharding find them as in any other stack.

To add one:

- the config derives from `HierarchyConfig` and says `num_levels`; where levels differ in width, `at_level` answers
  `AtLevel(self, hidden_size=..., ...)`, from which that level's layers, norms, positions and resampling are built;
- a subclass of `Resampling` says which items fire (`fire`), what they make (`shorten`) and how items use the answer
  (`expand`). What it must remember from call to call it keeps by `kept.read(name)` and `kept.write(0, name=...)`:
  [rows, ...], zeros where nothing was read, None in the first call and where there is no cache. A static cache is
  written in place: what was read is used before the name is written;
- `layer_kinds` are `"ragged_attention"`, whose cache holds each row's own items, and any recurrence, to which belongs
  `"causal_window_attention"`; `mixers` maps them to classes. `part_norm` puts a norm after each part.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils.import_utils import is_tracing

from ..layers.level import Level, LevelCache, RowStates, level_of
from ..ops.firing import Fired, fired_rows
from ..ops.token_choice import ChosenRows, all_rows, rows_of
from .backbone import Backbone
from .hierarchy_config import HierarchyConfig
from .level_masks import LEVEL_MASKS
from .masks import number_documents

COUNTS, STAGE = "memory_level_counts", "memory_stage_{}_"  # in the first layer of the cache


class Resampling(nn.Module):
    """The way from a level to the next one, and back; one for each level but the last.

    `stream` is [rows, items, size] of the level, `level` tells of its rows, `kept` what earlier calls left.
    """

    def __init__(self, config: HierarchyConfig, level: int):
        super().__init__()

    def most(self, length: int) -> int:
        """How many of `length` items in succession can fire: for shapes that may not rest on values."""
        return length

    def fire(self, stream: torch.Tensor, level: Level, kept: RowStates | None) -> tuple[torch.Tensor, Any]:
        """[rows, items] (bool), of real items; the first of a document must. And what the other two are told."""
        raise NotImplementedError

    def shorten(self, stream: torch.Tensor, fired: Fired, told: Any, level: Level, kept: RowStates | None):
        """[fired rows, fired items, size of the next level]. Not called where no item fired."""
        raise NotImplementedError

    def expand(
        self, stream: torch.Tensor, answer: torch.Tensor | None, fired: Fired, told: Any, level: Level, kept
    ) -> torch.Tensor:
        """[rows, items, size], from the answer of the next level to the items that fired, None where there are none,
        and the stream as it was before they were shortened."""
        raise NotImplementedError


@dataclass
class Call:
    """One forward pass of a hierarchy."""

    cache: Cache | None
    before: torch.Tensor | None  # [batch, levels] items that earlier calls read; None in the first
    context: dict  # what all layers are told
    counts: dict[int, torch.Tensor] = field(default_factory=dict)  # [batch] of each level, after the call

    def items_before(self, depth: int) -> torch.Tensor | None:
        return None if self.before is None else self.before[:, depth]

    def kept(self, depth: int, level: Level) -> RowStates | None:
        return None if self.cache is None else RowStates(self.cache.layers[0], level, STAGE.format(depth))

    def remember_counts(self, levels: int) -> None:
        """Of those levels at which nothing was read, what they were."""
        if self.cache is not None:
            tokens = self.counts[0]
            counts = [self.counts.get(i, torch.zeros_like(tokens)) for i in range(levels)]
            if self.before is not None:
                counts = [self.counts.get(i, self.before[:, i]) for i in range(levels)]
            self.cache.layers[0].write(0, **{COUNTS: torch.stack(counts, dim=1)})


class Hierarchy(Backbone):
    """A backbone of stages. `input_ids` that are packed or padded are unpacked at the entry, so that at every level
    rows are documents without gaps; hidden states and attention weights that are recorded are of these rows."""

    config: HierarchyConfig
    resampling: ClassVar[type[Resampling]]
    part_norm: ClassVar[bool] = False  # whether each part ends with a norm

    def add_parts(self, config: HierarchyConfig) -> None:
        stages, self.parts = config.num_levels - 1, config.parts
        self.inner_positions = nn.ModuleList(self.make_positions(level) for level in range(1, stages + 1))
        self.resamplings = nn.ModuleList(self.resampling(config, level) for level in range(stages))
        inner = (*range(stages + 1), *range(stages - 1, 0, -1)) if self.part_norm and stages else ()
        self.part_norms = nn.ModuleList(
            self.norm_class(config.at_level(level).hidden_size, config.norm_eps) for level in inner
        )

    def parameters_of(self, level: int) -> Iterator[nn.Parameter]:
        """Those of the layers of a level, of what makes its items into those of the next one, and of its norms."""
        last = len(self.parts) - 1
        modules = [layer for layer, at in zip(self.layers, self.config.layer_levels, strict=True) if at == level]
        modules += [*self.resamplings[level : level + 1], *self.inner_positions[max(0, level - 1) : level]]
        modules += [norm for part, norm in enumerate(self.part_norms) if min(part, last - part) == level]
        return (parameter for module in modules for parameter in module.parameters())

    def make_positions(self, level: int) -> nn.Module:
        """Of items of a level above tokens: counted anew at each."""
        return self.positions(self.config.at_level(level))

    def config_of(self, layer_idx: int):
        return self.config.at_level(self.config.layer_levels[layer_idx])

    def make_masks(self, inputs_embeds, attention_mask, past_key_values, position_ids, documents=None, **context):
        """Levels make their masks themselves: here only the documents are told apart."""
        if isinstance(attention_mask, dict):
            return attention_mask
        if documents is None:
            told = {"attention_mask": attention_mask, "position_ids": position_ids}
            documents = number_documents(self.config, inputs_embeds, past_key_values=past_key_values, **told)
        return {"documents": documents}

    def run(self, hidden_states, position_ids, masks, past_key_values, encoder_hidden_states=None, **context):
        call, documents = Call(past_key_values, None, context), masks["documents"]
        if past_key_values is not None:
            call.before = past_key_values.layers[0].read(COUNTS)
            for layer in past_key_values.layers:
                layer.write(hidden_states.shape[1])  # first of all: what there was before may be returned to
            fixed = past_key_values.is_compileable
        else:
            fixed = documents is None and is_tracing(hidden_states)
        fixed = fixed or hidden_states.is_meta  # where nothing is computed
        unread = hidden_states[..., : self.config.output_size]  # what stands where there is no token
        if documents is not None and not fixed and not documents.any():
            return unread
        rows = self.unpack(hidden_states, documents, fixed or call.before is not None)
        level = level_of(rows, rows.batch_row, rows.last, call.items_before(0), rows.batch, fixed)
        placed, positions = self.embed_positions(rows.take(hidden_states), level.place)
        answer = self.run_level(0, self.dropout(self.embed_norm(placed)), positions, level, call)
        call.remember_counts(self.config.num_levels)
        return rows.put(unread, answer)

    @staticmethod
    def unpack(tokens: torch.Tensor, documents: torch.Tensor | None, in_order: bool) -> ChosenRows:
        """The real tokens of a batch as rows: `in_order`, one for each row of the batch, else one for each document."""
        batch, length = tokens.shape[:2]
        if documents is None:
            index = torch.arange(batch * length, device=tokens.device).view(batch, length)
            return ChosenRows(index, None, index[:, 0] // length, None, batch, length)
        return all_rows(documents > 0, length) if in_order else rows_of(documents > 0, documents)

    def run_level(self, depth: int, stream, positions, level: Level, call: Call) -> torch.Tensor:
        """What the model answers to the items of a level."""
        cache = None
        if call.cache is not None:
            cache = LevelCache(call.cache, level)
            call.counts[depth] = cache.count
        told = call.context | {
            "position_embeddings": positions,
            "past_key_values": cache,
            "documents": None if level.real is None else level.real.long(),
        }
        masks = self.masks_of(depth, stream, level, cache)
        stream = self.run_part(depth, stream, masks, told)
        if depth == len(self.resamplings):
            return stream
        stream = self.run_above(depth, stream, level, call)
        return self.run_part(2 * len(self.resamplings) - depth, stream, masks, told)

    def masks_of(self, depth: int, stream, level: Level, cache: LevelCache | None) -> dict:
        """One for each layer type in use at a level."""
        config, masks = self.config.at_level(depth), {}
        for layer_idx, (kind, at) in enumerate(zip(config.layer_types, config.layer_levels, strict=True)):
            if at == depth and kind not in masks:
                masks[kind] = LEVEL_MASKS[kind](config, stream, level, cache, layer_idx)
        return masks

    def run_part(self, part: int, stream: torch.Tensor, masks: dict, told: dict) -> torch.Tensor:
        stream, dtype = self.residual.enter(stream), stream.dtype
        for layer_idx in self.parts[part]:
            mask = masks[self.config.layer_types[layer_idx]]
            stream = self.call_layer(
                self.layers[layer_idx], stream, None, attention_mask=mask, layer_idx=layer_idx, **told
            )
        stream = self.residual.leave(stream).to(dtype)
        if part == len(self.parts) - 1:
            return self.norm(stream)
        return self.part_norms[part](stream) if self.part_norm else stream

    def run_above(self, depth: int, stream: torch.Tensor, level: Level, call: Call) -> torch.Tensor:
        """The stream with what the levels above answer."""
        resampling, kept = self.resamplings[depth], call.kept(depth, level)
        fires, told = resampling.fire(stream, level, kept)
        fired = fired_rows(fires, resampling.most(stream.shape[1]) if level.fixed else None)
        answer = None
        if level.fixed or not fired.rows.nothing or call.context.get("output_router_logits"):
            items = resampling.shorten(stream, fired, told, level, kept)
            above = level.inside(fired.rows, call.items_before(depth + 1))
            items, positions = self.inner_positions[depth](items, above.place)
            answer = self.run_level(depth + 1, items, positions, above, call)
        return resampling.expand(stream, answer, fired, told, level, kept)
