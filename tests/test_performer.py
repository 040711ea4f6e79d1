"""Performer: what performer-pytorch computes where it is right, an estimate of softmax attention, and one that its
future does not reach at any scale."""

import math
from pathlib import Path

import pytest
import torch
from originals import original
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import DynamicCache

from hf_arch import find
from hf_arch.convert import convert
from hf_arch.modeling.layers.random_features import FEATURES, orthogonal_directions
from hf_arch.modeling.ops.linear_attention import (
    GROWTH,
    ask_keys,
    chunk_linear_attention,
    gather_keys,
    one_unit,
    recurrent_linear_attention,
)
from promises import EXACT, Case, some_tokens

GOLDEN = load_file(Path(__file__).parent / "goldens" / "performer_pytorch.safetensors")
PEERS = {"vocab_size": 23, "max_position_embeddings": 24, "hidden_size": 12, "num_attention_heads": 2}
PEERS |= {"intermediate_size": 12, "num_features": 10, "position_type": "learned", "norm_type": "layer_norm"}
PEERS |= {"attention_bias": True, "mlp_bias": True, "norm_eps": 1e-5, "num_key_value_heads": None}
ROW = find("performer")


def performer(head="ForCausalLM", **fields):
    return Case(ROW, head, fields=fields).build()


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize("direction", ["bidirectional", "causal"])
@torch.no_grad()
def test_equals_performer_pytorch(kernel, direction):
    """With an epsilon of 0 in the features of its softmax kernel: it has one that draws all weights together."""
    name = f"{kernel}_causal." if direction == "causal" else f"{kernel}."
    tensors = {key.removeprefix(name): tensor for key, tensor in GOLDEN.items() if key.startswith(name)}
    model = performer("Model", kernel_type=kernel, direction=direction, **PEERS)
    ids, expected = tensors.pop("ids"), tensors.pop("expected")
    missing, unknown = model.load_state_dict(tensors, strict=False)
    assert not unknown and all(name.endswith(".steps") for name in missing)
    assert_close(model(ids).last_hidden_state, expected, **EXACT)


def attention_of(count: int, causal: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """By features, and exact."""
    query, key, value = 0.5 * torch.randn(3, 1, 40, 2, 16, generator=torch.Generator().manual_seed(1)).double()
    config = ROW.tiny_config(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, num_features=count)
    made = FEATURES["softmax"](config, layer_idx=seed).double()
    scaling = 16**-0.5
    asked, (features, log_scale) = made.of_queries(query, scaling), made.of_keys(key, scaling)
    keys = features, value, log_scale
    found = chunk_linear_attention(asked, *keys)[0] if causal else ask_keys(asked, gather_keys(*keys))
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    exact = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal, scale=scaling)
    return found, exact.transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_the_error_falls_with_the_square_root_of_the_features(causal):
    counts, errors = (64, 256, 1024, 4096), []
    for count in counts:
        pairs = [attention_of(count, causal, seed) for seed in range(6)]
        errors.append(math.sqrt(sum((found - exact).square().mean().item() for found, exact in pairs) / len(pairs)))
    power = math.log(errors[-1] / errors[0]) / math.log(counts[-1] / counts[0])
    assert -0.6 < power < -0.4 and errors[-1] < 0.05


def test_directions_are_orthogonal_and_long_as_gaussian_ones():
    drawn = orthogonal_directions(40, 16, seed=3)
    for block in drawn.split(16):
        block = block / block.norm(dim=-1, keepdim=True)
        assert_close(block @ block.T, torch.eye(len(block)), atol=1e-5, rtol=0)
    many = torch.cat([orthogonal_directions(16, 16, seed) for seed in range(300)])
    assert_close(many.mean(0), torch.zeros(16), atol=0.06, rtol=0)
    assert_close(many.T @ many / len(many), torch.eye(16), atol=0.1, rtol=0)
    assert (many.norm(dim=-1).std() - 0.7).abs() < 0.1  # of a chi distribution, near 1 / sqrt(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@torch.no_grad()
def test_the_future_never_changes_the_past(dtype):
    """With weights so large that features differ by factors far past the range of numbers."""
    model = performer(initializer_range=0.5, hidden_size=64, num_attention_heads=2, num_key_value_heads=2).to(dtype)
    tokens = some_tokens(2, 600)
    changed = tokens.clone()
    changed[:, 300:] = (changed[:, 300:] + 7) % 96
    logits, other = model(tokens).logits, model(changed).logits
    assert logits.isfinite().all()
    assert_close(other[:, :300], logits[:, :300], **(EXACT if dtype == torch.float64 else {"atol": 2e-2, "rtol": 0}))


@pytest.mark.parametrize("growth", [0.0, 100.0, 1e6, -1e6])
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_keys_of_any_scale(growth, resumed, dtype):
    """The unit grows, or stays that of the first key, and no number is too large or too small for what is asked."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.rand(2, 2, 150, 3, 8, generator=generator).to(dtype)
    value = torch.randn(2, 150, 3, 5, generator=generator).to(dtype)
    noise = torch.randn(2, 150, 3, generator=generator).to(dtype)
    log_scale = noise + growth * torch.linspace(0, 1, 150, dtype=dtype)[:, None]
    assert (one_unit(log_scale, torch.full((2, 3), -1e30, dtype=dtype)) is None) == (growth > GROWTH)
    told, tensors = {"output_final_state": True}, [query, key, value, log_scale.requires_grad_()]
    if resumed:
        told["initial_state"] = recurrent_linear_attention(*(x[:, :9].detach() for x in tensors), **told)[1]
    found = [form(*tensors, **told) for form in (recurrent_linear_attention, chunk_linear_attention)]
    (expected, expected_state), (output, state) = found
    close = {"atol": 1e-10, "rtol": 1e-9} if dtype == torch.float64 else {"atol": 1e-4, "rtol": 1e-4}
    assert expected.isfinite().all()
    assert_close(output, expected, **close)
    assert_close(state, expected_state, **close)
    slopes = [torch.autograd.grad(answer.square().sum(), log_scale)[0] for answer, _ in found]
    assert_close(slopes[1], slopes[0], atol=10 * close["atol"], rtol=10 * close["rtol"])


@pytest.mark.parametrize("real", [None, "some"])
def test_all_keys_at_once_and_piece_by_piece(real):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.rand(2, 2, 50, 3, 8, generator=generator).double()
    value, log_scale = torch.randn(2, 50, 3, 5).double(), 300 * torch.randn(2, 50, 3).double()
    if real is not None:
        real = torch.rand(2, 50, generator=generator) > 0.4
        real[:, :20] = False
    shown = torch.ones(2, 50, dtype=torch.bool) if real is None else real
    scores = torch.einsum("blhm,bshm->bhls", query, key).log() + log_scale.transpose(1, 2)[:, :, None]
    weights = scores.masked_fill(~shown[:, None, None], -torch.inf).softmax(-1)
    expected = torch.einsum("bhls,bshd->blhd", weights, value)
    assert_close(ask_keys(query, gather_keys(key, value, log_scale, real=real)), expected)
    state = None
    for part in (slice(0, 11), slice(11, 12), slice(12, 50)):
        told = {"real": None if real is None else real[:, part], "state": state}
        state = gather_keys(key[:, part], value[:, part], log_scale[:, part], **told)
    assert_close(ask_keys(query, state), expected)


@torch.no_grad()
def test_the_state_is_as_large_after_a_long_text_as_after_a_short_one():
    model, sizes = performer(num_features=24), set()
    for length in (1, 10, 1300):
        cache = DynamicCache(config=model.config)
        model(some_tokens(1, length), past_key_values=cache)
        sizes.add(tuple(layer.read("state").shape for layer in cache.layers))
    assert sizes == {((1, 4, 24, 8 + 2),) * 2}  # [batch, heads, features, head_dim + 2]


def trained(model, steps: int):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        model(some_tokens(1, 9), labels=some_tokens(1, 9)).loss.backward()
        optimizer.step()
    return model


def test_features_are_drawn_anew_on_a_schedule_that_goes_on_after_saving(tmp_path):
    def directions(model):
        return torch.stack([layer.mixer.features.value.clone() for layer in model.model.layers])

    whole = performer(feature_redraw_interval=3).train()
    first = directions(whole)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(directions(trained(whole, 2)), first)
    whole.save_pretrained(tmp_path)
    second = directions(trained(whole, 1))
    assert (second - first).abs().amin() > 0
    resumed = type(whole).from_pretrained(tmp_path, dtype=torch.float64).train()
    torch.manual_seed(5)  # nothing random but what is saved
    assert torch.equal(directions(trained(resumed, 1)), second)
    assert not torch.equal(directions(trained(resumed, 3)), second)
    kept = performer(feature_redraw_interval=None).train()
    assert torch.equal(directions(trained(kept, 4)), first)


@pytest.mark.parametrize("name", ["llama", "llama tied, with wide heads", "gpt2", "bert", "bert sequence"])
@torch.no_grad()
def test_takes_over_the_weights_of_a_transformer(name, tmp_path):
    """With many features its answer comes near the original's."""
    theirs = original(name)
    for parameter in theirs.parameters():
        parameter.mul_(0.5)  # the exponentials of large scores need many features
    theirs.save_pretrained(tmp_path)
    ids, errors = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(1)), {}
    expected = theirs.double()(ids).logits
    for features in (16, 8192):
        torch.manual_seed(0)
        ours = convert(tmp_path, "performer", num_features=features)
        errors[features] = ((ours.double()(ids).logits - expected).std() / expected.std()).item()
    assert errors[8192] < 0.15 and errors[8192] < 0.3 * errors[16], errors
    assert type(convert(tmp_path, "performer", output=tmp_path / "ours")) is type(ours)
    loaded = type(ours).from_pretrained(tmp_path / "ours")
    assert loaded.config.num_features == max(16, loaded.config.num_features)


def test_a_warm_start_is_not_verified(tmp_path):
    original("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nothing to compare with"):
        convert(tmp_path, "performer", verify=True)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"num_features": 0}, "num_features is 0"),
        ({"feature_redraw_interval": 0}, "feature_redraw_interval is 0"),
        ({"kernel_epsilon": 0.0}, "kernel_epsilon is 0.0"),
        ({"layer_types": ["bidirectional_favor"] * 2}, "direction 'causal' has layers of type favor"),
        ({"position_type": "alibi"}, "position_type"),
        ({"direction": "prefix"}, "direction"),
    ],
)
def test_configurations_that_cannot_be(fields, said):
    with pytest.raises(Exception, match=said):
        ROW.tiny_config(**fields)
