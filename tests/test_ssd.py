"""SSD: equal to transformers' Mamba-2, and what its paper says of it."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from originals import largest_difference, scaled_up
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import Mamba2Config, Mamba2ForCausalLM, Mamba2Model

from hf_arch import find
from hf_arch.convert import convert

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 16}
CHOICES = {
    "groups": {"n_groups": 2},
    "one group": {"n_groups": 1, "conv_kernel": 2},
    "wide, tied, with biases": {"n_groups": 4, "expand": 4, "head_dim": 16, "use_bias": True}
    | {"use_conv_bias": False, "tie_word_embeddings": True},
    "limited steps": {"n_groups": 2, "time_step_limit": (0.3, 0.9)},
}


pytestmark = pytest.mark.usefixtures("narrows_nowhere")


def theirs(head=Mamba2ForCausalLM, **choices):
    torch.manual_seed(0)
    return scaled_up(head(Mamba2Config(**(SIZES | {"chunk_size": 8} | choices)))).eval()


@pytest.mark.parametrize("name", CHOICES)
def test_equals_transformers(name, tmp_path):
    original = theirs(**CHOICES[name])
    original.save_pretrained(tmp_path)
    assert largest_difference(convert(tmp_path, "ssd"), original) < 1e-8


def test_a_backbone_alone(tmp_path):
    original = theirs(Mamba2Model, n_groups=2)
    original.save_pretrained(tmp_path)
    assert largest_difference(convert(tmp_path, "ssd", head="Model"), original) < 1e-8


def test_the_layout_of_the_authors(tmp_path):
    original = theirs(n_groups=1, tie_word_embeddings=True)
    original.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    tensors = {name.replace("embeddings", "embedding"): tensor for name, tensor in tensors.items()}
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"].clone()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    layer = {"layer": "Mamba2", "d_state": 16, "headdim": 8}
    fields = {"d_model": 32, "n_layer": 2, "vocab_size": 90, "pad_vocab_size_multiple": 16, "ssm_cfg": layer}
    fields |= {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "tie_embeddings": True}
    fields |= {"d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert largest_difference(convert(tmp_path, "ssd"), original) < 1e-8

    (tmp_path / "config.json").write_text(json.dumps(fields | {"attn_layer_idx": [1]}))
    with pytest.raises(ValueError, match="attn_layer_idx"):
        convert(tmp_path, "ssd")


def test_a_step_that_is_almost_nothing_keeps_the_state_and_adds_nothing():
    """Selection (arXiv:2312.00752, section 3.5): a small step ignores its token, a large one forgets all before."""
    row = find("ssd")
    config = row.tiny_config(num_hidden_layers=1, conv_kernel=1, feed_forward_types=None)
    mixer = row.load("Model")(config).double().layers[0].mixer
    hidden = torch.randn(1, 9, 32, dtype=torch.float64)
    with torch.no_grad():
        mixer.dt_bias.fill_(-40.0)
        ignored = mixer(hidden) - mixer(hidden[:, [8] * 9])
        assert_close(ignored[:, 8], torch.zeros_like(ignored[:, 8]), atol=1e-12, rtol=0)
        mixer.dt_bias.fill_(40.0)
        mixer.A_log.fill_(3.0)
        assert_close(mixer(hidden)[:, 8], mixer(hidden[:, 8:])[:, 0], atol=1e-12, rtol=1e-10)


def test_initial_steps_and_decays_lie_where_the_config_says():
    row = find("ssd")
    model = row.load("Model")(row.tiny_config(time_step_min=0.01, time_step_max=0.2, num_attention_heads=16))
    for layer in model.layers:
        step = torch.nn.functional.softplus(layer.mixer.dt_bias)
        assert (step >= 0.0099).all() and (step <= 0.2001).all() and step.std() > 0.01
        assert (layer.mixer.A_log.exp() >= 1).all() and (layer.mixer.A_log.exp() <= 16).all()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_groups": 3}, "not a multiple of n_groups"),
        ({"expand": 1.1}, "not a multiple of num_attention_heads"),
        ({"state_size": 0}, "state_size is 0"),
        ({"time_step_min": 0.5}, "time_step_min"),
    ],
)
def test_configs_that_contradict_themselves(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        find("ssd").tiny_config(**fields)
