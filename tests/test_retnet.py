"""RetNet answers as the official code does, and has the properties that its paper derives.

The golden answers are torchscale's own, in float64, of its parallel and of its recurrent form
(`goldens/make_retnet_torchscale.py`).
"""

import functools
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from hf_arch import find
from hf_arch.convert import convert
from hf_arch.modeling.ops.retention import recurrent_retention, retention_decay
from hf_arch.modeling.state_space.retnet import modeling_retnet

GOLDEN = Path(__file__).parent / "goldens" / "retnet_torchscale.safetensors"
MODELS = ("plain", "shared")  # shared: one scaled embedding for input and output, and a norm after it


def golden(model):
    with safe_open(GOLDEN, "pt") as file:
        fields = json.loads(file.metadata()["configs"])[model]
    tensors = load_file(GOLDEN).items()
    return fields, {key.removeprefix(f"{model}."): x for key, x in tensors if key.startswith(f"{model}.")}


def checkpoint(folder, model, **more):
    """The golden's model in torchscale's layout, and its answers."""
    fields, tensors = golden(model)
    (folder / "config.json").write_text(json.dumps(fields | more))
    weights = {key.removeprefix("weights."): x for key, x in tensors.items() if key.startswith("weights.")}
    save_file(weights, folder / "model.safetensors")
    return tensors


def retnet(**fields):
    """A small model in float64 with weights scaled up, so that no part of it is nearly the identity."""
    row = find("retnet")
    torch.manual_seed(0)
    model = row.load("ForCausalLM")(row.tiny_config("ForCausalLM", **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 0.3 * noise)
    return model.double()


def some_ids(length, batch=2):
    return torch.randint(1, 96, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_equals_torchscale(model, form, tmp_path):
    expected = checkpoint(tmp_path, model)
    ours = convert(tmp_path, "retnet").double()
    assert (ours(expected["ids"]).logits - expected[form]).abs().max() < 1e-8


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_steps_equal_torchscale(model, tmp_path):
    expected = checkpoint(tmp_path, model)
    ours = convert(tmp_path, "retnet").double()
    cache = DynamicCache(config=ours.config)
    steps = [ours(ids, past_key_values=cache).logits for ids in expected["ids"].split(1, dim=1)]
    assert (torch.cat(steps, dim=1) - expected["recurrent"]).abs().max() < 1e-8


@torch.no_grad()
def test_a_shared_scaled_embedding_becomes_two(tmp_path):
    checkpoint(tmp_path, "shared")
    ours = convert(tmp_path, "retnet")
    assert not ours.config.tie_word_embeddings
    torch.testing.assert_close(ours.model.embed_tokens.weight, 4 * ours.lm_head.weight)  # sqrt(16)
    checkpoint(tmp_path, "shared", no_scale_embedding=True)
    ours = convert(tmp_path, "retnet")
    assert ours.config.tie_word_embeddings
    assert ours.model.embed_tokens.weight is ours.lm_head.weight


@torch.no_grad()
def test_names_of_the_ports_for_transformers(tmp_path):
    expected = checkpoint(tmp_path, "plain", model_type="retnet", architectures=["RetNetForCausalLM"])
    weights = load_file(tmp_path / "model.safetensors")
    weights = {f"model.{key}".replace("model.output_projection", "lm_head"): x for key, x in weights.items()}
    save_file(weights, tmp_path / "model.safetensors")
    assert (convert(tmp_path, "retnet").double()(expected["ids"]).logits - expected["parallel"]).abs().max() < 1e-8


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"deepnorm": True}, "deepnorm is True"),
        ({"decoder_normalize_before": False}, "decoder_normalize_before is False"),
        ({"moe_freq": 2}, "moe_freq is 2"),
        ({"multiway": True}, "multiway is True"),
        ({"vocab_size": -1}, "does not say the vocab_size"),
        ({"activation_fn": "tanh"}, "activation_fn is 'tanh'"),
    ],
)
def test_choices_of_torchscale_that_ours_does_not_have(fields, said, tmp_path):
    checkpoint(tmp_path, "plain", **fields)
    with pytest.raises(ValueError, match=said):
        convert(tmp_path, "retnet")


@pytest.mark.skipif(importlib.util.find_spec("torchscale") is not None, reason="torchscale is installed")
def test_verify_without_torchscale(tmp_path):
    checkpoint(tmp_path, "plain")
    with pytest.raises(ImportError, match="needs torchscale, which cannot be imported"):
        convert(tmp_path, "retnet", verify=True)


@torch.no_grad()
def test_parallel_chunkwise_and_recurrent_forms_are_equal(monkeypatch):
    model, ids = retnet(), some_ids(150)

    def with_chunks_of(size):
        form = functools.partial(modeling_retnet.chunk_retention, chunk_size=size)
        with monkeypatch.context() as patch:
            patch.setattr(modeling_retnet, "chunk_retention", form)
            return model(ids).logits

    whole = with_chunks_of(150)  # one chunk: the parallel form
    for size in (1, 7, 50, 64, 512):
        torch.testing.assert_close(with_chunks_of(size), whole, rtol=1e-10, atol=1e-10)
    with monkeypatch.context() as patch:
        patch.setattr(modeling_retnet, "chunk_retention", recurrent_retention)
        torch.testing.assert_close(model(ids).logits, whole, rtol=1e-10, atol=1e-10)
    cache = DynamicCache(config=model.config)
    steps = [model(part, past_key_values=cache).logits for part in ids.split([70, 1, 1, 30, 1, 47], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_heads", [1, 3, 8])
def test_decay_rates_are_the_papers(num_heads):
    gamma = retention_decay(num_heads, torch.device("cpu"), torch.float64)
    expected = torch.tensor([1 - 2 ** (-5 - head) for head in range(num_heads)], dtype=torch.float64)
    torch.testing.assert_close(gamma, expected, rtol=1e-14, atol=0)


@torch.no_grad()
def test_a_memory_fades_by_the_rate_of_its_head():
    key, value = torch.zeros(1, 40, 3, 4), torch.randn(1, 40, 3, 5)
    key[:, 0] = 1
    _, first = recurrent_retention(key[:, :1], key[:, :1], value[:, :1], output_final_state=True)
    _, last = recurrent_retention(key, key, value, output_final_state=True)
    rates = (last / first)[0, :, 0, 0]
    torch.testing.assert_close(rates, torch.tensor([(1 - 2 ** (-5 - head)) ** 39 for head in range(3)]))


def test_rotations_go_from_one_radian_per_token_to_one_per_theta():
    slow = find("retnet").tiny_config(hidden_size=64, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    for config, theta in ((find("retnet").tiny_config(hidden_size=64), 1e4), (slow, 500.0)):
        inv_freq = modeling_retnet.RetNetRotaryEmbedding(config).inv_freq
        torch.testing.assert_close(inv_freq, theta ** -torch.linspace(0, 1, 8))


@torch.no_grad()
def test_only_distances_count():
    model, ids = retnet(), some_ids(40)
    position_ids = torch.arange(40)[None]
    shifted = model(ids, position_ids=position_ids + 1000).logits
    torch.testing.assert_close(shifted, model(ids, position_ids=position_ids).logits, rtol=1e-7, atol=1e-7)
    stretched = model(ids, position_ids=position_ids[:, :1] + 2 * position_ids).logits
    assert (stretched - shifted).abs().max() > 0.1  # else the positions would not count at all


@torch.no_grad()
def test_the_state_is_as_large_after_a_long_text_as_after_a_short_one():
    model = retnet(value_expansion=1.5)
    sizes = set()
    for length in (1, 10, 300):
        cache = model(some_ids(length), use_cache=True).past_key_values
        sizes.add(tuple(layer.read("state").shape for layer in cache.layers))
        assert cache.get_seq_length() == length
    assert sizes == {((2, 4, 8, 12),) * 2}  # [batch, heads, key_dim, value_dim]


@torch.no_grad()
def test_the_norm_per_head_makes_the_scale_of_scores_and_values_immaterial():
    model, ids = retnet(norm_eps=1e-18), some_ids(30)
    before = model(ids).logits
    for layer in model.model.layers:
        layer.mixer.k_proj.weight.mul_(7)
        layer.mixer.v_proj.weight.unflatten(0, (4, -1)).mul_(torch.tensor([0.01, 1, 3, 100])[:, None, None])
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-10, atol=1e-10)
    model.model.layers[0].mixer.g_proj.weight.mul_(7)
    assert (model(ids).logits - before).abs().max() > 0.1  # the gate comes after the norm


def test_widths_of_values_are_exact():
    """448 * (3904 / 448) is below 3904 in floating point."""
    config = find("retnet").tiny_config(hidden_size=448, num_attention_heads=2, value_expansion=3904 / 448)
    with torch.device("meta"):
        mixer = modeling_retnet.MultiScaleRetention(config, 0)
    assert mixer.v_proj.out_features == mixer.o_proj.in_features == 3904


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"hidden_size": 36, "num_attention_heads": 4}, "must be even"),
        ({"value_expansion": 1.3}, "value_expansion 1.3 x hidden_size 32"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "RetNet scales no rotations"),
        ({"layer_types": ["full_attention"] * 2}, "knows retention"),
    ],
)
def test_configurations_that_cannot_be(fields, said):
    with pytest.raises(Exception, match=said) as caught:
        find("retnet").tiny_config(**fields)
    assert isinstance(caught.value.__cause__, ValueError)
