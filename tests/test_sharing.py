"""Layers that share their parameters (ALBERT): stored once, used as if each had a copy."""

import copy

import torch
from laboratory import build
from peft import get_peft_model
from transformers import DynamicCache

from hf_arch import lora_config
from promises import EXACT, some_tokens


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_shared_layers_are_stored_once():
    one, shared = build(num_hidden_layers=1), build(num_hidden_layers=6, num_hidden_groups=1)
    assert parameters(shared) == parameters(one)
    assert shared.state_dict().keys() == one.state_dict().keys()
    two = build(num_hidden_layers=6, num_hidden_groups=2)
    assert parameters(two) == parameters(build(num_hidden_layers=2))
    assert two.config.layer_groups == [0, 0, 0, 1, 1, 1]
    assert build(num_hidden_layers=5, num_hidden_groups=2).config.layer_groups == [0, 0, 0, 1, 1]


def unshared(model):
    """The same computation with parameters of its own in each layer."""
    groups = model.config.layer_groups
    whole = build("ForCausalLM", num_hidden_layers=len(groups))
    state = {key: x for key, x in model.state_dict().items() if ".layers." not in key}
    for layer, group in enumerate(groups):
        prefix = f"model.layers.{group}."
        state |= {
            key.replace(prefix, f"model.layers.{layer}."): x
            for key, x in model.state_dict().items()
            if key.startswith(prefix)
        }
    whole.load_state_dict(state)
    return whole


def test_shared_layers_compute_and_learn_as_copies_do():
    model = build("ForCausalLM", num_hidden_layers=5, num_hidden_groups=2)
    copies, tokens = unshared(model), some_tokens()
    for each in (model, copies):
        each(tokens, labels=tokens, use_cache=False).loss.backward()
    torch.testing.assert_close(model(tokens).logits, copies(tokens).logits, **EXACT)
    for group in (0, 1):
        layers = [layer for layer, its in enumerate(model.config.layer_groups) if its == group]
        for name, parameter in model.model.layers[group].named_parameters():
            total = sum(copies.model.layers[layer].get_parameter(name).grad for layer in layers)
            torch.testing.assert_close(parameter.grad, total, **EXACT)


@torch.no_grad()
def test_shared_layers_have_a_cache_each():
    model, tokens = build("ForCausalLM", num_hidden_layers=5, num_hidden_groups=2), some_tokens()
    cache = DynamicCache(config=model.config)
    logits = torch.cat(
        [model(part, past_key_values=cache).logits for part in tokens.split([30, 1, 1, 38], dim=1)], dim=1
    )
    torch.testing.assert_close(logits, model(tokens).logits, **EXACT)
    assert len(cache.layers) == 5 and all(layer.get_seq_length() == 70 for layer in cache.layers)


def test_one_adapter_serves_all_uses_of_a_shared_layer():
    shared = build("ForCausalLM", num_hidden_layers=3, num_hidden_groups=1)
    copies = get_peft_model(unshared(shared), lora_config(shared, r=4)).double()
    shared = get_peft_model(shared, lora_config(shared, r=4)).double()
    trained = [name for name, parameter in shared.named_parameters() if parameter.requires_grad]
    assert len(trained) * 3 == len([name for name, x in copies.named_parameters() if x.requires_grad])
    with torch.no_grad():
        for name in trained:
            parameter = shared.get_parameter(name)
            parameter.copy_(0.3 * torch.randn_like(parameter))
            for layer in range(3):
                copies.get_parameter(name.replace("layers.0", f"layers.{layer}")).copy_(parameter)
    tokens = some_tokens()
    for each in (shared, copies):
        each(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    torch.testing.assert_close(shared(input_ids=tokens).logits, copies(input_ids=tokens).logits, **EXACT)
    for name in trained:
        uses = [copies.get_parameter(name.replace("layers.0", f"layers.{layer}")).grad for layer in range(3)]
        assert all(gradient.abs().max() > 0 for gradient in uses)
        torch.testing.assert_close(shared.get_parameter(name).grad, sum(uses), **EXACT)


def test_checkpointing_shared_layers_gives_the_same_gradients():
    plain, tokens = build("ForCausalLM", num_hidden_layers=4, num_hidden_groups=2), some_tokens()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable()
    for model in (plain.train(), saving.train()):
        model(tokens, labels=tokens).loss.backward()
    for (name, parameter), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, **EXACT, msg=name)
