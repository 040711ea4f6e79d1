"""A dense model made sparse answers as before, and learns, saves and takes adapters as any other."""

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from originals import LLAMA, scaled_up
from peft import get_peft_model
from torch.testing import assert_close

import hf_arch
from hf_arch.convert import from_original
from hf_arch.modeling.layers.sparse import SparseFeedForward
from promises import EXACT, Case, some_tokens

TRANSFORMER = Case(hf_arch.find("transformer"), "ForCausalLM")
DENSE = {"feed_forward_types": ["dense"] * 2, "mlp_bias": False}
CASES = [
    (TRANSFORMER, {}),
    (Case(hf_arch.find("transformer"), "ForMaskedLM"), {"layers": [1], "kind": "hierarchical", "num_expert_groups": 2}),
    (Case(hf_arch.find("transformer"), "Model", "", {"num_hidden_groups": 1}), {"experts": 3, "experts_per_token": 3}),
    (Case(hf_arch.find("encoder_decoder"), "ForConditionalGeneration"), {"layers": range(1, 2)}),
    (Case(hf_arch.find("encoder_decoder"), "EncoderModel"), {"num_expert_groups": 2, "kind": "hierarchical"}),
    (Case(hf_arch.find("s6"), "ForCausalLM"), {"router_z_loss_coef": 0.1}),
    (Case(hf_arch.find("hat"), "ForMaskedLM", "", {**DENSE, "feed_forward_types": ["dense"] * 3}), {"kind": "switch"}),
    (Case(hf_arch.find("transformer"), "ForCausalLM", "", DENSE), {"kind": "switch", "experts_per_token": 1}),
]


def told(model, tokens: torch.Tensor) -> dict:
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})


def sparse_layers(model) -> int:
    return sum(isinstance(module, SparseFeedForward) for module in model.modules())


@pytest.mark.parametrize("case, choices", CASES, ids=str)
def test_it_answers_as_the_dense_model(case, choices, tmp_path):
    dense = case.build()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    model, tokens = hf_arch.upcycle(dense, **{"experts": 4} | choices), some_tokens()
    assert type(model) is type(dense) and model.dtype == torch.float64 and sparse_layers(model)
    switch = choices.get("kind") == "switch"  # nearly
    close = {"atol": 3e-3, "rtol": 3e-3} if switch else EXACT
    with torch.no_grad():
        expected, found = dense(**told(dense, tokens))[0], model(**told(model, tokens))[0]
        assert_close(found, expected, **close)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
        assert_close(again(**told(model, tokens))[0], found, atol=0, rtol=0)
    for part in (module for module in model.modules() if isinstance(module, SparseFeedForward)):
        assert 0 < part.router.gate.weight.std() < 1
    model.train()(**told(model, tokens))[0].square().mean().backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    assert_close(dict(dense.state_dict()), before, atol=0, rtol=0)  # which stays as it is


@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_a_llama_of_transformers_becomes_sparse_and_learns(kind):
    dense = scaled_up(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))).double().eval()
    dense.generation_config.max_new_tokens = 7
    model, tokens = hf_arch.upcycle(dense, experts=4, layers=[1], noise=0.0), some_tokens() % 61
    assert model.config.feed_forward_types == ["gated", "sparse"] and model.generation_config.max_new_tokens == 7
    assert not model.training and sparse_layers(model) == 1
    expected = dense(tokens).logits
    assert_close(model(tokens).logits, from_original(dense)(tokens).logits, **EXACT)
    assert_close(model(tokens).logits, expected, atol=1e-4, rtol=1e-4)  # theirs narrows to float32 in places
    if kind == "adapters":
        model = get_peft_model(model, hf_arch.lora_config(model, r=2)).double()
        names = {name for name, weight in model.named_parameters() if weight.requires_grad}
        assert any(".router.gate." in name for name in names) and any(".experts." in name for name in names)
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01), []
    for _ in range(8):
        loss = model.train()(input_ids=tokens, labels=tokens, output_router_logits=True).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert_close(dense(tokens).logits, expected, atol=0, rtol=0)
    if kind == "full":
        experts = model.model.layers[1].feed_forward.experts.down_proj
        assert (experts[0] - experts[1]).abs().max() > 1e-3  # they part


@torch.no_grad()
def test_noise_makes_experts_differ():
    dense = TRANSFORMER.build(torch.bfloat16)
    torch.manual_seed(3)
    model = hf_arch.upcycle(dense.train(), experts=4, noise=0.1)
    held = model.model.layers[0].feed_forward.experts
    gate = dense.model.layers[0].feed_forward.gate_proj.weight
    added = (held.gate_up_proj[:, :48] - gate).float()
    assert model.training and held.gate_up_proj.dtype == torch.bfloat16
    assert_close(added.std(), 0.1 * gate.float().std(), rtol=0.1, atol=0)
    assert (added[0] - added[1]).std() > 0.1 * gate.float().std()


@pytest.mark.parametrize(
    "fields, choices, message",
    [
        ({"mlp_bias": True}, {}, "Experts have no bias"),
        ({"feed_forward_types": ["gated", "sparse"], "num_local_experts": 4}, {}, "has experts already"),
        (DENSE, {}, "No layer can become 'sparse'.*type dense. Dense ones become 'switch'"),
        ({"feed_forward_types": ["gated", "dense"]}, {"layers": [0, 1]}, "Layer 1 has a feed-forward of type dense"),
        ({}, {"layers": [2]}, "layers names 2, but there are 0 to 1"),
        ({}, {"layers": []}, "No layer can become"),
        (
            {},
            {"kind": "soft"},
            "'soft' is no feed-forward that can begin as a dense one does; that is one of sparse",
        ),
        ({}, {"kind": "hierarchical"}, "need num_expert_groups"),
        ({}, {"experts_per_token": 9}, "num_experts_per_tok 9 is not between"),
    ],
    ids=str,
)
def test_what_cannot_become_sparse_is_explained(fields, choices, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        hf_arch.upcycle(TRANSFORMER.build(**fields), **choices)


def test_foreign_and_adapted_models_are_refused():
    reformer = Case(hf_arch.find("reformer"), "ForCausalLM", "", {"feed_forward_types": ["gated"] * 2})
    with pytest.raises(ValueError, match="none of a hf_arch_reformer"):
        hf_arch.upcycle(reformer.build(mlp_bias=False))
    model = TRANSFORMER.build()
    with pytest.raises(ValueError, match="merge it first"):
        hf_arch.upcycle(get_peft_model(model, hf_arch.lora_config(model)))
    config = transformers.MptConfig(d_model=8, n_heads=2, n_layers=1)
    with pytest.raises(ValueError, match="A MptModel is neither of hf_arch"):
        hf_arch.upcycle(transformers.MptModel(config))
