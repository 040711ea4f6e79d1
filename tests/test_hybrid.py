"""Mixers of several architectures in one stack."""

from dataclasses import fields

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from hf_arch import ARCHITECTURES, find
from hf_arch.modeling.skeleton.config import ArchConfig
from hf_arch.modeling.state_space.hybrid.configuration_hybrid import FIXED
from hf_arch.modeling.state_space.hybrid.modeling_hybrid import MIXERS
from promises import EXACT, Case, some_tokens

ROW = find("hybrid")


@pytest.mark.parametrize("kind", MIXERS)
@torch.no_grad()
def test_a_stack_of_guests_is_the_architecture_they_come_from(kind):
    """The same weights give the same answer, in a stack of one kind and in the architecture's own."""
    own = next(row for row in ARCHITECTURES if row.name != "hybrid" and kind in row.load("Config").layer_kinds)
    kinds, fixed = {"layer_types": [kind] * 2, "feed_forward_types": ["gated"] * 2}, FIXED.get(kind, {})
    original = Case(own, "ForCausalLM", fields=kinds | fixed).build()
    told = {field.name: getattr(original.config, field.name) for field in fields(original.config)}
    shared = {field.name: told.pop(field.name) for field in fields(ArchConfig)} | kinds
    told = {name: value for name, value in told.items() if name not in fixed}
    norm = "layer_norm" if isinstance(original.model.norm, nn.LayerNorm) else "rms_norm"
    choices = shared | {"norm_type": norm, "mixer_options": {kind: told}}
    hybrid = Case(ROW, "ForCausalLM", kind, choices).build()
    hybrid.model.embed_positions = original.model.embed_positions
    hybrid.load_state_dict(original.state_dict())
    tokens = some_tokens()
    torch.testing.assert_close(hybrid(tokens).logits, original(tokens).logits, **EXACT)


@pytest.mark.parametrize(
    "choices, message",
    [
        ({"mixer_options": {"ssd": {}}}, "mixer_options tells ssd; of other architectures, layer_types has s6"),
        ({"mixer_options": {"sliding_attention": {}}}, "mixer_options tells sliding_attention"),
        ({"mixer_options": {"s6": {"states": 3}}}, "mixer_options of s6 has states, which is no choice of a mixer"),
        ({"layer_types": ["rwkv7"] * 2, "mixer_options": {"rwkv7": {"value_residual": True}}}, "has value_residual"),
        ({"mixer_options": {"s6": {"state_size": 0}}}, "In the mixers of type s6: state_size is 0"),
        ({"layer_types": ["s6", "lstm"]}, "lstm; hf_arch_hybrid knows full_attention, sliding_attention, sink"),
        ({"direction": "bidirectional"}, "A hybrid is causal"),
    ],
)
def test_configurations_that_cannot_be(choices, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        ROW.tiny_config(**choices)
