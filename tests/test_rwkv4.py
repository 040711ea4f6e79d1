"""RWKV: equal to transformers' RWKV-4, and what its paper says of it."""

import re

import pytest
import torch
from originals import largest_difference, scaled_up
from torch.testing import assert_close
from transformers import RwkvConfig, RwkvForCausalLM, RwkvModel

from hf_arch import find
from hf_arch.convert import convert
from hf_arch.modeling.ops.wkv import chunk_wkv, fla_wkv, recurrent_wkv

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "rescale_every": 0}
CHOICES = {
    "plain": {},
    "wide, tied": {"attention_hidden_size": 48, "intermediate_size": 40, "tie_word_embeddings": True},
}


def theirs(head=RwkvForCausalLM, **choices):
    torch.manual_seed(0)
    model = scaled_up(head(RwkvConfig(**(SIZES | choices))))
    for name, parameter in model.named_parameters():
        if "time_mix" in name:
            parameter.data = torch.rand_like(parameter)
    return model


def author_names(tensors):
    """The names of the author's files."""
    for ours, others in (
        (r"^rwkv\.embeddings", "emb"),
        (r"^rwkv\.", ""),
        (r"\.attention\.", ".att."),
        (r"\.feed_forward\.", ".ffn."),
        (r"\.pre_ln\.", ".ln0."),
        (r"time_mix_([kvr])\w+", r"time_mix_\1"),
    ):
        tensors = {re.sub(ours, others, name): tensor for name, tensor in tensors.items()}
    return tensors


@pytest.mark.usefixtures("narrows_nowhere")
@pytest.mark.parametrize("name", CHOICES)
def test_equals_transformers(name, tmp_path):
    original = theirs(**CHOICES[name]).train()  # in eval it makes a cache, for no width but hidden_size
    original.save_pretrained(tmp_path)
    assert largest_difference(convert(tmp_path, "rwkv4"), original) < 1e-8


@pytest.mark.usefixtures("narrows_nowhere")
def test_a_backbone_alone(tmp_path):
    original = theirs(RwkvModel)
    original.save_pretrained(tmp_path)
    assert largest_difference(convert(tmp_path, "rwkv4", head="Model"), original) < 1e-8


@pytest.mark.usefixtures("narrows_nowhere")
def test_what_transformers_rescales_is_the_same_function(tmp_path):
    """It halves in eval, and there the epsilon of a norm is of something smaller; in training it does not."""
    original = theirs(rescale_every=1)
    original.save_pretrained(tmp_path)
    ours = convert(tmp_path, "rwkv4")
    assert largest_difference(ours, original.train()) < 1e-8
    assert largest_difference(ours, original.eval()) < 1e-3


@pytest.mark.usefixtures("narrows_nowhere")
def test_the_file_of_the_author(tmp_path):
    original = theirs()
    torch.save(author_names(original.state_dict()), tmp_path / "RWKV-4-Pile.pth")
    for source in (tmp_path, tmp_path / "RWKV-4-Pile.pth"):
        ours = convert(source, "rwkv4")
        assert largest_difference(ours, original) < 1e-8
    assert ours.config.num_hidden_layers == 3 and ours.config.intermediate_size == 128


def test_files_that_are_of_another_model(tmp_path):
    torch.save({"emb.weight": torch.zeros(3, 4)}, tmp_path / "model.pth")
    with pytest.raises(NotADirectoryError, match="tells not how large a rwkv4 is: give the folder"):
        convert(tmp_path / "model.pth", "rwkv4")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        convert(tmp_path, "rwkv4")


@pytest.mark.parametrize("far", [30.0, 300.0, 1e4])
def test_keys_of_any_size(far):
    """A key that outweighs all others by more than a number can hold, then fades below them."""
    generator = torch.Generator().manual_seed(1)
    key, value = torch.randn(2, 1, 100, 8, generator=generator, dtype=torch.float64)
    key[:, ::13] *= far
    log_decay = -torch.logspace(-3, 3, 8, dtype=torch.float64)
    tensors = key, value, log_decay, far * torch.randn(8, generator=generator, dtype=torch.float64)
    expected, _ = recurrent_wkv(*tensors)
    assert_close(chunk_wkv(*tensors)[0], expected, atol=1e-10, rtol=0)
    narrow = [tensor.float().requires_grad_() for tensor in tensors]
    output, _ = chunk_wkv(*narrow)
    assert_close(output, expected.float(), atol=1e-6 * far, rtol=0)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), narrow))


def test_a_mean_of_what_was_read():
    """Where nothing fades and keys are equal, values count alike."""
    value = torch.randn(1, 40, 3, dtype=torch.float64)
    nothing = torch.zeros(3, dtype=torch.float64)
    output, _ = chunk_wkv(torch.zeros_like(value), value, nothing, nothing)
    assert_close(output, value.cumsum(1) / torch.arange(1, 41)[:, None])


def kernel_of_fla(w, u, k, v, state):
    """What that of flash-linear-attention computes: state [batch, 3, 1, channels], a numerator, a denominator and the
    logarithm of what both lack; w is the logarithm of the rate of decay."""
    (numerator, denominator, scale), outputs = state.squeeze(2).unbind(1), []
    for key, value in zip(k.unbind(1), v.unbind(1), strict=True):
        top = torch.maximum(scale, u + key)
        before, now = (scale - top).exp(), (u + key - top).exp()
        outputs.append((before * numerator + now * value) / (before * denominator + now))
        top = torch.maximum(scale - w.exp(), key)
        before, now = (scale - w.exp() - top).exp(), (key - top).exp()
        numerator, denominator, scale = before * numerator + now * value, before * denominator + now, top
    return torch.stack(outputs, 1), torch.stack((numerator, denominator, scale), 1)[:, :, None]


def test_the_kernel_of_fla_is_called_as_it_wants():
    generator = torch.Generator().manual_seed(2)
    key, value = torch.randn(2, 2, 20, 8, generator=generator, dtype=torch.float64)
    tensors = key, value, -torch.rand(8, generator=generator, dtype=torch.float64), key[0, 0]
    state = None
    for _ in range(2):  # from nothing, and going on
        options = {"initial_state": state, "output_final_state": True}
        expected, state = recurrent_wkv(*tensors, **options)
        output, final_state = fla_wkv(kernel_of_fla, *tensors, **options)
        assert_close(output, expected, atol=1e-12, rtol=1e-10)
        assert_close(final_state, state, atol=1e-12, rtol=1e-10)


def test_it_begins_as_the_official_code():
    """A new layer answers with zeros, so that the stream is the normed embedding."""
    row = find("rwkv4")
    model = row.load("Model")(row.tiny_config(num_hidden_layers=3))
    embeddings = model.embed_tokens.weight
    assert 0.8e-4 < embeddings.std() < 1.2e-4 and not embeddings[0].any()
    outputs = model(torch.arange(3, 9)[None], output_hidden_states=True)
    assert_close(outputs.hidden_states[-2], outputs.hidden_states[0])
    first, last = model.layers[0].mixer, model.layers[2].mixer
    assert_close(first.time_mix[1], torch.arange(32) / 32)
    assert_close(last.time_mix[2], (torch.arange(32) / 32) ** (1 / 3) + 0.3)
    assert_close(first.time_decay[[0, -1]], torch.tensor([-5.0, 3.0]))
    assert_close(first.time_first[:3] - first.time_first[1:4], torch.tensor([-0.5, 1.0, -0.5]))
