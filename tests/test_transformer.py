"""The laboratory: each choice of the Transformer against its definition written slowly."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from laboratory import BIAS_FREE, ROW, build
from torch import nn
from transformers.activations import ACT2FN

from promises import EXACT, some_tokens


def heard(module, call):
    """(input, context, output) of `module` during `call()`."""
    said = []
    hook = module.register_forward_hook(
        lambda _, args, kwargs, out: said.append((args[0], kwargs, out)), with_kwargs=True
    )
    with torch.no_grad():
        call()
    hook.remove()
    return said[0]


def slow_attention(mixer, hidden_states, sees, bias=lambda head, i, j: 0.0):
    """softmax(q k^T / sqrt(dim) + bias) v, one query of one head at a time; `sees(i, j)`: may query i look at key j."""
    dim, groups = mixer.head_dim, mixer.num_key_value_groups
    query, key, value = (
        projection(hidden_states).unflatten(-1, (-1, dim)) for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    answer = torch.zeros_like(query)
    for row in range(query.shape[0]):
        for head in range(query.shape[2]):
            for i in range(query.shape[1]):
                seen = [j for j in range(query.shape[1]) if sees(i, j)]
                scores = [query[row, i, head] @ key[row, j, head // groups] / dim**0.5 + bias(head, i, j) for j in seen]
                weights = torch.stack(scores).softmax(0)
                answer[row, i, head] = sum(
                    w * value[row, j, head // groups] for w, j in zip(weights, seen, strict=True)
                )
    return mixer.o_proj(answer.flatten(-2))


def causal(i, j):
    return j <= i


CHOICES = {
    "causal": ({}, causal, {}),
    "windows": ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 3}, lambda i, j: 0 <= i - j < 3, {}),
    "both ways": ({"direction": "bidirectional"}, lambda i, j: True, {}),
    "prefix": ({"direction": "prefix"}, lambda i, j: j <= i or (i < 4 and j < 4), {"prefix_length": 4}),
    "prefix of nothing": ({"direction": "prefix"}, causal, {}),
    "multi-query": ({"num_key_value_heads": 1}, causal, {}),
    "a key head each": ({"num_key_value_heads": 4}, causal, {}),
    "biases": ({"attention_bias": True}, causal, {}),
    "wide heads": ({"head_dim": 10}, causal, {}),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_attention_is_its_definition(choice):
    fields, sees, told = CHOICES[choice]
    model = build(**BIAS_FREE, **fields)
    mixer = model.layers[1].mixer
    hidden_states, _, found = heard(mixer, lambda: model(some_tokens(length=9), **told))
    torch.testing.assert_close(found, slow_attention(mixer, hidden_states, sees), **EXACT)


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("position_type", ["alibi", "t5"])
def test_biased_attention_is_its_definition(position_type, direction):
    model = build(position_type=position_type, direction=direction)
    positions, mixer = model.embed_positions, model.layers[1].mixer

    def bias(head, i, j):
        if position_type == "alibi":
            return -positions.slopes()[head] * abs(i - j)
        return positions.relative_attention_bias.weight[positions.bucket(torch.tensor(j - i)), head]

    hidden_states, _, found = heard(mixer, lambda: model(some_tokens(length=9)))
    sees = causal if direction == "causal" else (lambda i, j: True)
    torch.testing.assert_close(found, slow_attention(mixer, hidden_states, sees, bias), **EXACT)


@torch.no_grad()
def test_grouped_heads_equal_all_heads_with_keys_repeated():
    for heads in (1, 2):
        grouped, whole = build(num_key_value_heads=heads), build(num_key_value_heads=4)
        state = grouped.state_dict()
        for key in state:
            if "k_proj" in key or "v_proj" in key:
                state[key] = state[key].unflatten(0, (heads, -1)).repeat_interleave(4 // heads, dim=0).flatten(0, 1)
        whole.load_state_dict(state)
        tokens = some_tokens()
        torch.testing.assert_close(grouped(tokens)[0], whole(tokens)[0], **EXACT)


def wired(wiring, layer, x, **context):
    """What the papers write, with the parts of `layer`."""
    mixer, feed_forward, norm = layer.mixer, layer.feed_forward, layer.residual.norm
    if wiring == "pre_norm":
        x = x + mixer(norm["mixer"](x), **context)
        return x + feed_forward(norm["feed_forward"](x))
    if wiring == "post_norm":
        x = norm["mixer"](x + mixer(x, **context))
        return norm["feed_forward"](x + feed_forward(x))
    if wiring == "deep_norm":  # two layers here: (2 * 2) ** (1 / 4)
        x = norm["mixer"](math.sqrt(2) * x + mixer(x, **context))
        return norm["feed_forward"](math.sqrt(2) * x + feed_forward(x))
    normed = norm["mixer"](x)
    return x + mixer(normed, **context) + feed_forward(normed)


@pytest.mark.parametrize("norm_type, norm_class", [("rms_norm", "RMSNorm"), ("layer_norm", "LayerNorm")])
@pytest.mark.parametrize("wiring", ["pre_norm", "post_norm", "deep_norm", "parallel"])
def test_a_layer_is_wired_as_its_paper_says(wiring, norm_type, norm_class):
    model = build(residual_type=wiring, norm_type=norm_type, norm_eps=1e-3)
    layer = model.layers[1]
    stream, context, found = heard(layer, lambda: model(some_tokens(length=9), use_cache=False))
    with torch.no_grad():
        torch.testing.assert_close(found, wired(wiring, layer, stream, **context), **EXACT)
        norms = {name for name, module in layer.named_modules() if type(module).__name__ == norm_class}
        assert len(norms) == (1 if wiring == "parallel" else 2)
        assert isinstance(model.norm, nn.Identity) == (wiring in ("post_norm", "deep_norm"))
        last = model(some_tokens(length=9), use_cache=False)[0]
        torch.testing.assert_close(last, model.norm(found), **EXACT)


def test_norms_are_their_definitions():
    x = torch.randn(3, 32, dtype=torch.float64)
    rms = build(norm_eps=1e-3).norm
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * rms.weight
    torch.testing.assert_close(rms(x), expected, **EXACT)
    layer = build(norm_type="layer_norm", norm_eps=1e-3).norm
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * layer.weight + layer.bias
    torch.testing.assert_close(layer(x), expected, **EXACT)


@pytest.mark.parametrize("kind", ["gated", "dense"])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_new", "relu", "relu2", "sigmoid"])
@pytest.mark.parametrize("bias", [False, True])
def test_feed_forward_is_its_definition(kind, activation, bias):
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    block = build(feed_forward_types=[kind] * 2, hidden_act=activation, mlp_bias=bias).layers[0].feed_forward
    act = {"silu": lambda x: x * torch.sigmoid(x), "sigmoid": torch.sigmoid, "relu": lambda x: x.clamp(min=0)}
    act |= {"relu2": lambda x: x.clamp(min=0) ** 2, "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))}
    act |= {"gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))}
    linear = {
        name: lambda x, m=module: x @ m.weight.T + (m.bias if bias else 0) for name, module in block.named_children()
    }
    inner = act[activation](linear["gate_proj" if kind == "gated" else "up_proj"](x))
    inner = inner * linear["up_proj"](x) if kind == "gated" else inner
    torch.testing.assert_close(block(x), linear["down_proj"](inner), **EXACT)
    assert (block.up_proj.bias is not None) == bias


@pytest.mark.parametrize("kind", ["gated", "dense"])
def test_every_activation_of_transformers_can_be_taken(kind):
    for activation in ACT2FN:
        config = ROW.tiny_config(feed_forward_types=[kind] * 2, hidden_act=activation)
        with torch.device("meta"):
            assert type(ROW.load("Model")(config).layers[0].feed_forward.act_fn) is type(ACT2FN[activation])


@pytest.mark.parametrize("layers", [2, 8])
def test_deep_norm_begins_as_its_paper_says(layers):
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": layers, "num_key_value_heads": 4}
    model = ROW.load("Model")(ROW.tiny_config(residual_type="deep_norm", norm_type="layer_norm", **sizes))
    alpha, beta = (2 * layers) ** 0.25, (8 * layers) ** -0.25
    for layer in model.layers:
        assert layer.residual.alpha == pytest.approx(alpha)
        for name, module in (*layer.mixer.named_children(), *layer.feed_forward.named_children()):
            if isinstance(module, nn.Linear):
                gain = 1 if name in ("q_proj", "k_proj") else beta
                xavier = math.sqrt(2 / (module.in_features + module.out_features))
                assert module.weight.std().item() == pytest.approx(gain * xavier, rel=0.03), name
                assert (
                    abs(module.weight.mean().item()) < 0.01 * xavier + 5 * gain * xavier / module.weight.numel() ** 0.5
                )


def test_what_deep_norm_initialises_is_only_what_was_not_loaded(tmp_path):
    saved = build("ForCausalLM", residual_type="deep_norm").float()
    saved.save_pretrained(tmp_path)
    for head in ("ForCausalLM", "Model", "ForTokenClassification"):
        loaded = ROW.load(head).from_pretrained(tmp_path)
        for key, tensor in loaded.base_model.state_dict().items():
            assert torch.equal(tensor, saved.model.state_dict()[key]), key


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 0, "num_attention_heads": -4}, "num_attention_heads is -4"),
        ({"num_attention_heads": 5}, "32 is not a multiple of num_attention_heads 5"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers"),
        ({"layer_types": ["retention"] * 2}, "retention.*knows full_attention"),
        ({"feed_forward_types": ["gated", "wide"]}, "wide.*knows gated, dense"),
        ({"direction": "backward"}, "'causal', 'bidirectional', 'prefix'"),
        ({"residual_type": "mid_norm"}, "'pre_norm', 'post_norm', 'deep_norm', 'parallel'"),
        ({"norm_type": "batch_norm"}, "'rms_norm', 'layer_norm'"),
        ({"position_type": "absolute"}, "'none', 'sinusoidal', 'learned', 'rope', 'xpos', 'alibi', 't5'"),
        ({"layer_types": ["bidirectional_attention"] * 2}, "'causal' has layers of type full_attention, sliding"),
        ({"direction": "bidirectional", "layer_types": ["full_attention"] * 2}, "has layers of type bidirectional"),
        (
            {"direction": "prefix", "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4},
            "'prefix' has layers of type full_attention, not sliding_attention",
        ),
        ({"layer_types": ["sliding_attention"] * 2}, "need a positive sliding_window"),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": -1}, "need a positive sliding_window"),
        ({"head_dim": 7}, "the width of a head must be even"),
        ({"position_type": "xpos", "max_position_embeddings": 100000}, "overflows past 32768"),
        ({"position_type": "t5", "relative_attention_max_distance": 16}, "must be over half"),
        ({"position_type": "sinusoidal", "hidden_size": 33, "head_dim": 8}, "needs an even hidden_size, not 33"),
        ({"num_hidden_groups": 3}, "num_hidden_groups 3 is not between 1 and the 2 layers"),
        ({"num_hidden_groups": 1, "feed_forward_types": ["gated", "dense"]}, "must be of one layer type"),
        ({"rope_parameters": {"rope_type": "stretched"}}, "'stretched' is unknown; there are default, linear"),
        ({"rope_parameters": {"rope_type": "linear"}}, "Missing required keys.*factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "must be 1"),
        (
            {"rope_parameters": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor has 1 numbers for the 4 pairs",
        ),
    ],
)
def test_configurations_that_cannot_be(fields, said):
    with pytest.raises(StrictDataclassError, match=said):
        ROW.tiny_config(**fields)


def test_heads_that_the_direction_does_not_have():
    with pytest.raises(ValueError, match="cannot name the next token: take ForMaskedLM"):
        ROW.load("ForCausalLM")(ROW.tiny_config(direction="bidirectional"))
    for direction in ("causal", "prefix"):
        with pytest.raises(ValueError, match="this model is causal. Take ForCausalLM"):
            ROW.load("ForMaskedLM")(ROW.tiny_config(direction=direction))
    for direction in ("causal", "bidirectional"):
        model = ROW.load("Model")(ROW.tiny_config(direction=direction))
        with pytest.raises(ValueError, match=f"A prefix needs direction='prefix'; this model is {direction}"):
            model(some_tokens(), prefix_length=3)
