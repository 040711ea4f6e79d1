"""`register_attention`: windows and sinks in transformers' own decoders."""

import pytest
import torch
import transformers
from originals import LLAMA, scaled_up
from torch.testing import assert_close

import hf_arch
from promises import some_tokens

WINDOW, SINKS = 9, 3
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
SIZES = LLAMA | {"max_position_embeddings": 512}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
MODELS = {
    "llama": ("LlamaForCausalLM", SIZES),
    "linear": ("LlamaForCausalLM", SIZES | {"rope_parameters": LINEAR}),
    "qwen3": ("Qwen3ForCausalLM", SIZES | {"head_dim": 16}),
    "phi": ("PhiForCausalLM", SIZES | {"partial_rotary_factor": 0.5}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),
}


def build(name: str = "llama", sinks: int = SINKS, window: int = WINDOW, **more):
    kind, fields = MODELS[name]
    model_class = getattr(transformers, kind)
    model = scaled_up(model_class(model_class.config_class(**fields | more))).float()
    hf_arch.register_attention("tested", window=window, sinks=sinks)
    model.set_attn_implementation("tested")
    return model


def tokens_of(length: int = 70, batch: int = 2) -> torch.Tensor:
    return some_tokens(batch, length) % 58 + 3


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_window_over_all_is_the_model_as_it_was(name):
    model, tokens = build(name, window=70), tokens_of()
    found = model(tokens).logits
    model.set_attn_implementation("sdpa")
    assert_close(found, model(tokens).logits, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "linear", "qwen3", "phi"])
def test_sinks_are_seen_from_where_they_stand_in_the_cache(name):
    """One layer: the last token sees what the model would see of sinks and window alone, put together."""
    layers = {"num_hidden_layers": 1}
    model, tokens = build(name, **layers), tokens_of()
    logits = model(tokens).logits
    model.set_attn_implementation("sdpa")
    for length in (1, 3, 9, 12, 13, 40, 70):
        kept = tokens[:, :length]
        if length > SINKS + WINDOW:
            kept = torch.cat((kept[:, :SINKS], kept[:, -WINDOW:]), dim=1)
        assert_close(logits[:, length - 1], model(kept).logits[:, -1], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("sinks", [0, SINKS])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_cached_padded_packed_or_cut_does_not_matter(name, sinks):
    model, tokens = build(name, sinks), tokens_of()
    whole = model(tokens, use_cache=False).logits
    for make in (lambda: None, lambda: hf_arch.window_cache(model)):
        cache, logits = make(), []
        for piece in tokens.split((30, 1, 1, 20, 1, 17), dim=1):
            step = model(piece, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            logits.append(step.logits)
        assert_close(torch.cat(logits, dim=1), whole, **CLOSE)
    assert all(layer.keys.shape[2] == sinks + WINDOW - 1 for layer in cache.layers)
    padded, mask = torch.cat((tokens[:, :5], tokens), dim=1), torch.ones(2, 75, dtype=torch.long)
    mask[:, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    assert_close(found, whole, **CLOSE)
    positions = torch.cat((torch.arange(30), torch.arange(40)))[None].expand(2, -1)
    alone = [model(piece).logits for piece in tokens.split((30, 40), dim=1)]
    assert_close(model(tokens, position_ids=positions, use_cache=False).logits, torch.cat(alone, dim=1), **CLOSE)


@torch.no_grad()
def test_it_generates_alike_by_every_cache_in_constant_memory():
    model, tokens = build(), tokens_of(20)
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(tokens, attention_mask=mask, **options)
    cache = hf_arch.window_cache(model, padding=6)
    assert torch.equal(model.generate(tokens, attention_mask=mask, **options, past_key_values=cache), expected)
    assert all(layer.keys.shape[2] == 6 + SINKS + WINDOW - 1 for layer in cache.layers)
    alone = model.generate(tokens[1:, 6:], **options, past_key_values=hf_arch.window_cache(model))
    assert torch.equal(alone[0, 14:], expected[1, 20:])
    beams = options | {"num_beams": 3}
    expected = model.generate(tokens, **beams)
    assert torch.equal(model.generate(tokens, **beams, past_key_values=hf_arch.window_cache(model)), expected)


def test_it_trains():
    model, tokens = build().train(), tokens_of()
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@torch.no_grad()
def test_long_texts_hold_no_pairs():
    model, made = build(), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    with Watch():
        model(tokens_of(2048, 1), use_cache=False)
    assert max(made) < 2048 * 256


def test_what_cannot_be():
    for sizes in ({"window": 1}, {"window": 8, "sinks": -1}):
        with pytest.raises(ValueError, match="must be at least 2, and sinks"):
            hf_arch.register_attention("wrong", **sizes)
    model, tokens = build(), tokens_of(20)
    with pytest.raises(ValueError, match="A static cache holds all tokens"):
        model.generate(tokens, max_new_tokens=2, cache_implementation="static")
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0
    with pytest.raises(ValueError, match="padding=..."):
        told = {"attention_mask": mask, "max_new_tokens": 9, "eos_token_id": None, "pad_token_id": 0}
        model.generate(tokens, **told, past_key_values=hf_arch.window_cache(model))
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    with pytest.raises(ValueError, match="Sinks need rotary positions of type"):
        build(**dynamic)(tokens)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="register_attention"):
        hf_arch.window_cache(model)
