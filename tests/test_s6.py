"""S6: equal to transformers' Mamba, and what its paper says of it."""

import json

import pytest
import torch
from originals import largest_difference, scaled_up
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import MambaConfig, MambaForCausalLM, MambaModel

from hf_arch import find
from hf_arch.convert import convert
from hf_arch.modeling.ops.selective_scan import (
    BLOCK,
    chunk_selective_scan,
    mamba_selective_scan,
    recurrent_selective_scan,
)

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "pad_token_id": None}
CHOICES = {
    "tied": {},
    "wide, untied, with biases": {"expand": 3, "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False},
    "other ranks": {"time_step_rank": 5, "conv_kernel": 2},
}

pytestmark = pytest.mark.usefixtures("narrows_nowhere")


def theirs(head=MambaForCausalLM, **choices):
    torch.manual_seed(0)
    return scaled_up(head(MambaConfig(**(SIZES | choices)))).eval()


@pytest.mark.parametrize("name", CHOICES)
def test_equals_transformers(name, tmp_path):
    original = theirs(**CHOICES[name])
    original.save_pretrained(tmp_path)
    assert largest_difference(convert(tmp_path, "s6"), original) < 1e-8


def test_a_backbone_alone(tmp_path):
    original = theirs(MambaModel)
    original.save_pretrained(tmp_path)
    assert largest_difference(convert(tmp_path, "s6", head="Model"), original) < 1e-8


def test_the_layout_of_the_authors(tmp_path):
    original = theirs()
    original.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    tensors = {name.replace("embeddings", "embedding"): tensor for name, tensor in tensors.items()}
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"].clone()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    fields = {"d_model": 32, "n_layer": 2, "vocab_size": 90, "pad_vocab_size_multiple": 8, "ssm_cfg": {"d_state": 8}}
    fields |= {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert largest_difference(convert(tmp_path, "s6"), original) < 1e-8
    (tmp_path / "config.json").write_text(json.dumps(fields | {"ssm_cfg": {"layer": "Mamba2"}}))
    with pytest.raises(ValueError, match="Mamba2"):
        convert(tmp_path, "s6")


def test_a_step_that_is_almost_nothing_keeps_the_state_and_a_large_one_forgets():
    """Selection (arXiv:2312.00752, section 3.5)."""
    row = find("s6")
    config = row.tiny_config(num_hidden_layers=1, conv_kernel=1, feed_forward_types=None)
    mixer = row.load("Model")(config).double().layers[0].mixer
    hidden = torch.randn(1, 9, 32, dtype=torch.float64)
    with torch.no_grad():
        mixer.dt_proj.bias.fill_(-40.0)
        assert_close(mixer(hidden)[:, 8], mixer(hidden[:, 8:])[:, 0], atol=1e-12, rtol=0)  # only the skip is left
        mixer.dt_proj.bias.fill_(40.0)
        assert_close(mixer(hidden)[:, 8], mixer(hidden[:, 8:])[:, 0], atol=1e-12, rtol=1e-10)
        mixer.dt_proj.bias.fill_(0.0)
        assert (mixer(hidden)[:, 8] - mixer(hidden[:, 8:])[:, 0]).abs().max() > 1e-6


def test_memory_does_not_grow_with_length_times_states():
    """Forward and backward keep states of one block only (section 3.3.2)."""
    saved = []
    length, channels, states = 8 * BLOCK, 64, 64
    x, step = torch.randn(2, 1, length, channels, requires_grad=True).unbind(0)
    A = -torch.ones(states, channels)
    key, query = torch.randn(2, 1, length, states).unbind(0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        output, _ = chunk_selective_scan(x, step.abs(), A, key, query)
    assert sum(saved) < length * channels * states / 4
    output.sum().backward()


def test_the_kernel_of_the_authors_is_called_as_it_asks():
    """With a stand-in of its signature; what it cannot do it declines."""

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, return_last_state=False):
        sequences = (u.mT, delta.mT, A.T, B.mT, C.mT)
        output, state = recurrent_selective_scan(*sequences, output_final_state=True)
        return (output.mT, state.mT) if return_last_state else output.mT

    x, step = torch.randn(2, 3, 9, 6).unbind(0)
    A, key, query = -torch.rand(5, 6), torch.randn(3, 9, 5), torch.randn(3, 9, 5)
    tensors = x, step.abs(), A, key, query
    padding = (torch.arange(9) >= torch.tensor([[0], [2], [4]])).long()
    for documents in (None, padding):
        expected, expected_state = recurrent_selective_scan(*tensors, documents=documents, output_final_state=True)
        with torch.no_grad():
            output, state = mamba_selective_scan(
                selective_scan_fn, *tensors, documents=documents, output_final_state=True
            )
        assert_close((output, state), (expected, expected_state))
        assert_close(mamba_selective_scan(selective_scan_fn, *tensors, documents=documents), (expected, None))
    for cannot in ({"initial_state": state}, {"documents": padding * 2}, {"output_final_state": True}):
        assert mamba_selective_scan(selective_scan_fn, *tensors, **cannot) is NotImplemented
