"""Attention within patches of a text (MegaByte: Yu et al., 2023, arXiv:2305.07185, section 2.1)."""

import torch

from ..ops.patches import PatchRows
from .attention import Attention


class PatchAttention(Attention):
    """Attention of each item to those of its own patch, up to itself: patches are rows side by side. A memory holds the
    keys and values of one patch at most."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: PatchRows,
        position_embeddings: tuple,
        past_key_values=None,
        layer_idx: int = 0,
        key_positions: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        patches, memory = attention_mask, self.memory(past_key_values, layer_idx)
        projections = self.q_proj, self.k_proj, self.v_proj
        query, key, value = (proj(hidden_states).unflatten(-1, (-1, self.head_dim)) for proj in projections)
        query, key = position_embeddings.rotate(query, key)
        names = {"memory_patch_key": key, "memory_patch_value": value}
        held = {name: None if memory is None else memory.read(name) for name in names}
        query = query[:, None] if patches.step else patches.lay(query, None)
        laid = {name: patches.lay(x, held[name]) for name, x in names.items()}
        if memory is not None:
            memory.write(patches.length, **{name: patches.last(x) for name, x in laid.items()})
        heads = (x.flatten(0, 1).transpose(1, 2) for x in (query, *laid.values()))  # [patches of all rows, heads, ...]
        output, weights = self.attend(*heads, patches.mask, **kwargs)
        output = output.unflatten(0, (hidden_states.shape[0], -1))
        return self.answer(output[:, 0] if patches.step else patches.back(output), weights)
