"""Latent attention: its two forms are one, its cache holds latents, and adapters act in both."""

import functools

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import eager_attention_forward

import hf_arch
from hf_arch.modeling.layers import latent_attention
from hf_arch.modeling.layers.latent_attention import LatentAttention
from hf_arch.modeling.ops.latent_attention import absorbed_latent_attention, expanded_latent_attention
from promises import EXACT, Case, some_tokens

ROW = hf_arch.find("deepseek")
CASE = Case(ROW, "ForCausalLM")


def some_tensors(queries: int, keys: int, dim: int):
    """(query, latent, key_rope, to_key, to_value) of 3 heads, 6 + 4 wide, from latents of 5 numbers."""
    draw = functools.partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(queries))
    return draw(2, queries, 3, 10), draw(2, keys, 5), draw(2, keys, 4), draw(3, 6, 5), draw(3, dim, 5)


def by_eager(query, key, value, mask):
    """transformers' own definition; causal where there is no mask."""
    if mask is None:
        unseen = torch.ones(query.shape[2], key.shape[2]).tril(0 if query.shape[2] > 1 else key.shape[2]) == 0
        mask = torch.zeros(1, 1, *unseen.shape, dtype=query.dtype).masked_fill(unseen, float("-inf"))
    module = torch.nn.Module()
    module.num_key_value_groups = 1
    weights = (query @ key.transpose(2, 3) * 0.7 + mask).softmax(-1)
    output, _ = eager_attention_forward(module, query, key, value, mask, scaling=0.7)
    assert_close(output, (weights @ value).transpose(1, 2), atol=1e-5, rtol=1e-5)  # theirs takes softmax in float32
    return (weights @ value).transpose(1, 2), weights


@pytest.mark.parametrize("dim", [4, 10, 13])
@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 9), (4, 9), (9, 9)])
@pytest.mark.parametrize("masked", ["not", "bool", "added"])
def test_the_two_forms_are_one(queries, keys, dim, masked):
    query, latent, key_rope, to_key, to_value = (x.requires_grad_() for x in some_tensors(queries, keys, dim))
    mask = None
    if masked != "not":
        mask = torch.rand(2, 1, queries, keys, generator=torch.Generator().manual_seed(2)) < 0.6
        mask[..., 0] = True
    told = torch.zeros(mask.shape).double().masked_fill(~mask, float("-inf")) if masked != "not" else None
    key, value = (torch.einsum("bkr,hdr->bkhd", latent, matrix) for matrix in (to_key, to_value))
    expected = expanded_latent_attention(by_eager, query, key, value, key_rope, told)
    tensors = query, latent, key_rope, to_key, to_value
    found = absorbed_latent_attention(*tensors, mask if masked == "bool" else told, 0.7)
    for mine, other in zip(found, expected, strict=True):
        assert_close(mine, other, **EXACT)
    gradients = (torch.autograd.grad(output.square().sum(), tensors) for output, _ in (found, expected))
    for mine, other in zip(*gradients, strict=True):
        assert_close(mine, other, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"q_lora_rank": None}], ids=str)
def test_a_few_tokens_after_a_text_ask_the_latents(fields):
    """Also through an adapter of what makes keys, merged or not."""
    model, tokens = CASE.build(**fields), some_tokens()
    adapted = get_peft_model(CASE.build(**fields), hf_arch.lora_config(model, r=2, target_modules=["kv_b_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.5)
    merged = get_peft_model(CASE.build(**fields), adapted.peft_config["default"])
    merged.load_state_dict(adapted.state_dict())
    for each in (model, adapted.double().eval(), merged.double().merge_and_unload().eval()):
        cache = each(input_ids=tokens[:, :66], use_cache=True).past_key_values
        found = each(input_ids=tokens[:, 66:], past_key_values=cache).logits
        assert_close(found, each(input_ids=tokens, use_cache=False).logits[:, 66:], **EXACT)


@torch.no_grad()
def test_a_step_is_less_work_than_making_all_keys(monkeypatch):
    model, tokens = CASE.build(torch.float32), some_tokens()

    def operations() -> int:
        cache = model(tokens, use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(tokens[:, :1], past_key_values=cache)
        return counter.get_total_flops()

    absorbed = operations()
    monkeypatch.setattr(LatentAttention, "absorbs", lambda *told: False)
    made = 2 * 2 * 2 * 71 * 12 * 4 * (8 + 6)  # in two layers, for two rows
    assert operations() - absorbed > 0.8 * made


def test_the_weights_of_an_adapter_are_found_once():
    adapted = get_peft_model(CASE.build(), hf_arch.lora_config(CASE.config(), target_modules=["kv_b_proj"])).eval()
    expansion = next(each for each in adapted.modules() if isinstance(each, LatentAttention)).expansion
    with torch.no_grad():
        first = expansion.matrices()[0]
        assert expansion.matrices()[0].data_ptr() == first.data_ptr()
        next(p for name, p in expansion.named_parameters() if "lora_B" in name).add_(1.0)
        assert not torch.equal(expansion.matrices()[0], first)


def numbers_held(config) -> int:
    """Of a token, in one layer."""
    return config.kv_lora_rank + config.qk_rope_head_dim


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_cache_holds_latents(cache):
    """After a prompt short enough to ask the latents itself, where there is room for more."""
    model, tokens = CASE.build(), some_tokens(length=6)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    found = model.generate(tokens, cache_implementation=cache, **options)
    assert torch.equal(found.sequences, model.generate(tokens, use_cache=False, **options).sequences)
    for layer in found.past_key_values.layers:
        assert layer.keys.shape[1] == layer.values.shape[1] == 1
        assert layer.keys.shape[-1] + layer.values.shape[-1] == numbers_held(model.config)


def test_the_cache_of_deepseek_v3_is_a_small_part_of_keys_and_values():
    config = ROW.load("Config")(
        hidden_size=7168,
        num_attention_heads=128,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    expanded = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    assert numbers_held(config) / expanded == (512 + 64) / (128 * (192 + 128)) < 1 / 8


@torch.no_grad()
def test_unequal_widths_are_no_reason_to_write_all_pairs_down(monkeypatch):
    """torch's fused attention knows one width; another kernel would take the rest."""
    asked = []

    def watch(kernel, *tensors):
        def seen(query, key, value, mask):
            asked.append({x.shape[-1] for x in (query, key, value)})
            return kernel(query, key, value, mask)

        return expanded_latent_attention(seen, *tensors)

    monkeypatch.setattr(latent_attention, "expanded_latent_attention", watch)
    CASE.build()(some_tokens())
    assert asked and all(len(widths) == 1 for widths in asked)
