"""Pruned models: exact where nothing was lost, smaller by their config, and as good as any model afterwards."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import get_peft_model
from torch.testing import assert_close

import hf_arch
from hf_arch.compress import prunable, prune, quantize
from hf_arch.compress.prune import importance, planned
from hf_arch.compress.sites import SITES
from promises import EXACT, MODELS, Case, some_tokens

KINDS = ("heads", "channels", "experts", "layers")
ALSO = {
    name: Case(hf_arch.find(name.partition("-")[0]), "ForCausalLM", name, fields)
    for name, fields in {
        "transformer-multi_query": {"num_key_value_heads": 1},
        "transformer-biased": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": None},
        "transformer-alibi": {"position_type": "alibi"},
        "transformer-shared": {"num_hidden_groups": 1},
        "hybrid-ssd": {"layer_types": ["ssd", "full_attention"], "mixer_options": {"ssd": {"state_size": 8}}},
    }.items()
}
CAN = {"transformer-alibi": ["channels", "layers"], "transformer-shared": ["heads", "channels"]} | {
    "hybrid-ssd": ["channels", "layers"],
    "hnet": [],
    "hourglass": ["channels"],
    "megabyte": ["channels"],
    "retnet": ["channels", "layers"],
    "mixtral": [*KINDS],
    "transformer": ["heads", "channels", "layers"],
}


def told(model) -> dict[str, torch.Tensor]:
    tokens = some_tokens(2, 24)
    return {"input_ids": tokens, "labels": tokens}


@pytest.mark.parametrize("case", [*MODELS, *ALSO.values()], ids=str)
def test_what_counts_for_nothing_goes_unmissed(case, tmp_path):
    """Half of each kind of part is zero, and so is what the loss says of it: without it the answers are the same."""
    model = case.build()
    able = prunable(model)
    assert able == CAN.get(case.variant or case.row.name, able)
    for kind in [kind for kind in ("heads", "channels") if kind in able]:
        for site in SITES[kind](model, 0.5)[1]:
            dim, width, _ = site.slices[site.scored]
            with torch.no_grad():
                weight = model.get_parameter(site.scored).movedim(dim, 0)
                weight[: (site.units - site.count) * width] = 0.0
    batch = told(model)
    shares = {kind: 0.5 for kind in able if kind in ("heads", "channels")}
    if not shares:
        with pytest.raises(ValueError, match="cannot go alike|What can go is"):
            prune(model, channels=0.5)
        return
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = prune(model, **shares, batches=[batch])
    assert small.num_parameters() < model.num_parameters() and not small.training
    with torch.no_grad():
        expected = model(**batch).logits
        assert_close(small(**batch).logits, expected, atol=1e-10, rtol=1e-10)
        assert_close(prune(model, **shares)(**batch).logits, expected, atol=1e-10, rtol=1e-10)  # by size, too
        small.save_pretrained(tmp_path)
        again = type(small).from_pretrained(tmp_path, dtype=torch.float64)
        assert_close(again(**batch).logits, small(**batch).logits, atol=0, rtol=0)
    adapted = get_peft_model(again, hf_arch.lora_config(again, r=2)).double().train()
    adapted(**batch).loss.backward()
    assert any(weight.grad is not None and weight.grad.any() for weight in adapted.parameters())
    assert_close(dict(model.state_dict()), before, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["mixtral", "deepseek", "switch"])
def test_pruned_experts_are_experts_that_no_token_may_take(name):
    case = Case(hf_arch.find(name), "ForCausalLM")
    model, batch = case.build(), told(None)
    found = {}
    small = prune(model, experts=0.5, batches=[batch])
    assert small.config.num_local_experts == model.config.num_local_experts // 2
    parts = [(m.feed_forward, s.feed_forward) for m, s in zip(model.model.layers, small.model.layers, strict=True)]
    for whole, part in parts:
        if not hasattr(whole, "experts"):
            continue
        for number, matrix in enumerate(whole.experts.down_proj):
            found[number] = any(torch.equal(matrix, other) for other in part.experts.down_proj)
        gone = torch.tensor([number for number, stays in found.items() if not stays])
        assert len(gone) == len(found) // 2
        whole.router.gate.register_forward_hook(lambda _, __, out, gone=gone: out.index_fill(-1, gone, -1e9))
    with torch.no_grad():
        assert_close(small(**batch).logits, model(**batch).logits, **EXACT)


@pytest.mark.parametrize("name", ["transformer", "rwkv7", "hybrid", "encoder_decoder"])
@torch.no_grad()
def test_pruned_layers_are_layers_that_answer_nothing(name):
    row = hf_arch.find(name)
    head = "ForConditionalGeneration" if name == "encoder_decoder" else "ForCausalLM"
    model, batch = Case(row, head).build(num_hidden_layers=4), told(None)
    stacks = [model.model.encoder, model.model.decoder] if name == "encoder_decoder" else [model.model]
    for stack in stacks:
        for layer in list(stack.layers)[1 : len(stack.layers) // 2 + 1]:
            for parameter in layer.parameters():
                parameter.mul_(1e-30 if parameter.ndim == 1 else 0.0)
    small = prune(model, layers=0.5)
    assert small.config.num_hidden_layers == 2
    assert_close(small(**batch).logits, model(**batch).logits, **EXACT)


def test_importance_is_what_the_loss_would_change():
    """To first order: a head whose answers are scaled by 1 - epsilon."""
    model, batch = Case(hf_arch.find("transformer"), "ForCausalLM").build(num_key_value_heads=4), told(None)
    _, sites, stacks = planned(model, {"heads": 0.5})
    scores = importance(model, [batch], sites, stacks)[0]
    weight, epsilon = model.get_parameter(sites[0].scored), 1e-5

    def loss() -> torch.Tensor:  # in float64
        return F.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    before = loss()
    for head in range(4):
        with torch.no_grad():
            columns = weight[:, 8 * head : 8 * head + 8]
            columns *= 1 - epsilon
            change = (before - loss()) / epsilon
            columns /= 1 - epsilon
        assert_close(change.abs(), scores[head].double(), rtol=1e-3, atol=1e-6)


def test_what_cannot_be_pruned_is_explained():
    model = Case(hf_arch.find("transformer"), "ForCausalLM").build(torch.float32)
    for shares, message in [
        ({}, "Nothing is to go"),
        ({"heads": 1.0}, "heads is 1.0; it is the share that goes"),
        ({"experts": 0.5}, "no experts among which tokens choose. What can go is: heads, channels, layers"),
        ({"channels": 0.5, "batches": []}, "batches are empty"),
        ({"channels": 0.5, "batches": [{"input_ids": some_tokens(1, 9)}]}, "without labels"),
    ]:
        with pytest.raises(ValueError, match=message):
            prune(model, **shares)
    with pytest.raises(ValueError, match="differ by head.*What can go is: channels, layers"):
        prune(ALSO["transformer-alibi"].build(), heads=0.5)
    with pytest.raises(ValueError, match="heads of this .* cannot go alike.*What can go is: channels, layers"):
        prune(ALSO["hybrid-ssd"].build(), heads=0.5)
    with pytest.raises(ValueError, match="quantised: prune it in full precision"):
        prune(quantize(model), heads=0.5)
    with pytest.raises(ValueError, match="merge it first"):
        prune(get_peft_model(model, hf_arch.lora_config(model)), heads=0.5)
    with pytest.raises(ValueError, match="convert it first"):
        prune(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2)), heads=0.5)
