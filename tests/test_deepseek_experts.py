"""Experts of DeepSeek: how they are chosen, kept equally busy, and what else is learned from a text."""

import functools

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import hf_arch
from hf_arch.modeling.layers.feed_forward import GatedMLP
from hf_arch.modeling.moe.deepseek.sparse_deepseek import CorrectionBias, DeepSeekFeedForward, sequence_balance
from promises import EXACT, Case, some_tokens

CASE = Case(hf_arch.find("deepseek"), "ForCausalLM")
METHODS = ("greedy", "group_limited_greedy", "noaux_tc")


def feed_forward(method: str = "noaux_tc", **fields) -> DeepSeekFeedForward:
    torch.manual_seed(0)
    groups = {"n_group": 1} if method == "greedy" else {}
    model = CASE.build(topk_method=method, **groups | fields)
    made = model.model.layers[1].feed_forward
    if method == "noaux_tc":
        made.router.bias.value.normal_(std=0.3)
    return made


def some_states(length: int = 50) -> torch.Tensor:
    return torch.randn(2, length, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_one_expert_is_a_dense_feed_forward(method):
    fields = {"num_local_experts": 2, "num_experts_per_tok": 2, "n_group": 1, "n_shared_experts": 0}
    made = feed_forward(method, **fields, moe_intermediate_size=48)
    dense = GatedMLP(CASE.config(), 1).double()
    experts = made.experts
    for of_all, own in ((experts.gate_up_proj, None), (experts.down_proj, dense.down_proj.weight)):
        of_all[1] = of_all[0]
        if own is not None:
            own.copy_(of_all[0])
    for part, own in zip(experts.gate_up_proj[0].chunk(2), (dense.gate_proj, dense.up_proj), strict=True):
        own.weight.copy_(part)
    assert_close(made(some_states()), dense(some_states()), **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_experts_does_not_matter(method):
    made, states = feed_forward(method, n_group=1), some_states()
    expected, order = made(states), torch.randperm(8, generator=torch.Generator().manual_seed(2))
    of_all = [made.experts.gate_up_proj, made.experts.down_proj, made.router.gate.weight]
    for tensor in of_all + ([made.router.bias.value] if method == "noaux_tc" else []):
        tensor.copy_(tensor[order])
    assert_close(made(states), expected, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS[1:])
def test_experts_are_chosen_within_the_best_groups(method):
    """By a search among all pairs of groups."""
    router = feed_forward(method, n_group=4, topk_group=2, num_experts_per_tok=3).router
    tokens = some_states().flatten(0, 1)
    index, weight = router(tokens)
    logits = router.gate(tokens)
    scores = logits.softmax(-1) if method == "group_limited_greedy" else logits.sigmoid()
    corrected = scores if method == "group_limited_greedy" else scores + router.bias.value
    for row, (chosen, weights) in enumerate(zip(index, weight, strict=True)):
        groups = corrected[row].view(4, 2)
        worth = groups.amax(-1) if method == "group_limited_greedy" else groups.sum(-1)
        allowed = [expert for group in worth.argsort()[-2:].tolist() for expert in (2 * group, 2 * group + 1)]
        best = sorted(allowed, key=lambda expert: -corrected[row, expert])[:3]
        assert sorted(chosen.tolist()) == sorted(best)
        told = scores[row, chosen]
        assert_close(weights, told / told.sum(), **EXACT)


@torch.no_grad()
def test_the_bias_is_in_the_choice_alone():
    made, states = feed_forward(num_experts_per_tok=8, n_group=1), some_states()
    expected = made(states)
    made.router.bias.value.normal_(std=9.0)
    assert_close(made(states), expected, **EXACT)


def test_a_step_moves_the_bias_towards_idle_experts_by_real_tokens():
    model, tokens = CASE.build(router_bias_update_rate=0.5).train(), some_tokens()
    mask = torch.ones_like(tokens)
    mask[1, :60] = 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    outputs = model(tokens, attention_mask=mask, labels=tokens, output_router_logits=True)
    outputs.loss.backward()
    bias = next(module for module in model.modules() if isinstance(module, CorrectionBias))
    assert not bias.value.any()
    optimizer.step()
    chosen = outputs.router_choices[0]
    load = torch.stack([(chosen == expert).sum() for expert in range(8)]).float()
    assert load.sum() == 2 * mask.sum()
    assert_close(bias.value, 0.5 * (load.mean() - load).sign(), **EXACT)


def test_the_bias_is_saved_and_stays_wide(tmp_path):
    model = CASE.build(torch.float32)
    name = "model.layers.1.feed_forward.router.bias.value"
    model.state_dict()[name].copy_(torch.arange(8) * 1e-3 + 1)
    expected = model.state_dict()[name].clone()
    for narrow in (model.bfloat16(), model.half(), model.double()):
        assert_close(narrow.state_dict()[name], expected, atol=0, rtol=0)
    model.bfloat16().save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert_close(loaded.state_dict()[name], expected, atol=0, rtol=0)
        assert loaded.lm_head.weight.dtype == dtype


@functools.cache
def busiest(**fields) -> float:
    """How busy the busiest expert is, over the mean, after a short run on text of few words."""
    model, tokens = CASE.build(torch.float32, **fields).train(), some_tokens(8, 32) % 12 + 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    with torch.no_grad():
        load = hf_arch.routing_statistics(model.eval()(tokens, output_router_logits=True)).load
    return float(load.max()) * load.shape[-1]


OFF = {"router_bias_update_rate": 0.0, "sequence_balance_coef": 0.0}


@pytest.mark.parametrize("fields", [{"router_bias_update_rate": 0.02}, {"sequence_balance_coef": 0.3}], ids=str)
def test_balancing_balances(fields, record_property):
    found = {"without": busiest(**OFF), "with": busiest(**OFF | fields)}
    record_property("busiest expert over the mean", found)
    assert found["with"] - 1 < 0.6 * (found["without"] - 1)  # 1.62 without; 1.22 by the bias, 1.28 by the loss


def by_hand(probabilities, top_k, documents):
    """Equations 17 to 20, document by document."""
    total, pairs = 0.0, {(row, int(number)) for row, numbers in enumerate(documents) for number in numbers.unique()}
    for row, number in sorted(pair for pair in pairs if pair[1]):
        scores = probabilities[row, documents[row] == number]
        share = (scores / scores.sum(-1, keepdim=True)).mean(0)
        taken = torch.zeros_like(scores)
        for token, chosen in enumerate(scores.topk(top_k).indices):
            taken[token, chosen] = 1.0
        total = total + len(scores) * (scores.shape[-1] / top_k * taken.mean(0) * share).sum()
    return total


@pytest.mark.parametrize("documents", [None, "padded", "packed"])
def test_the_balance_of_a_sequence_is_that_of_the_paper(documents):
    probabilities = torch.rand(2, 20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    probabilities.requires_grad_()
    told = torch.ones(2, 20, dtype=torch.long)
    if documents is not None:
        told[1, :6] = 0
    if documents == "packed":
        told[0, 9:] = 2
    found, tokens = sequence_balance(probabilities, 3, None if documents is None else told)
    expected = by_hand(probabilities, 3, told)
    assert tokens == (told > 0).sum()
    assert_close(found, expected, **EXACT)
    gradients = (torch.autograd.grad(each, probabilities)[0] for each in (found, expected))
    assert_close(*gradients, **EXACT)
    even, count = sequence_balance(torch.full((1, 9, 4), 0.5), 2)
    assert_close(even / count, torch.tensor(1.0))


def test_further_tokens_are_named_within_documents():
    """The loss of packed texts, one of them padded, is that of each by itself."""
    model = CASE.build(num_nextn_predict_layers=2, mtp_loss_coef=1.0, sequence_balance_coef=0.0).train()
    texts = [some_tokens(1, length, seed=length) for length in (9, 14, 7)]
    alone = sum(model(text, labels=text, num_items_in_batch=20).loss for text in texts)
    packed, padding = torch.cat(texts, dim=1), some_tokens(1, 5, seed=3)
    positions = torch.cat([torch.arange(text.shape[1]) for text in (*texts, padding)])[None]
    labels = torch.cat([*(torch.cat((torch.tensor([[-100]]), text[:, 1:]), dim=1) for text in texts), padding], dim=1)
    labels[:, -5:] = -100
    mask = torch.ones_like(labels)
    mask[:, -5:] = 0
    told = {"attention_mask": mask, "position_ids": positions, "labels": labels, "num_items_in_batch": 20}
    assert_close(model(torch.cat((packed, padding), dim=1), **told).loss, alone, atol=1e-6, rtol=1e-6)


def test_adapters_reach_further_layers_and_saving_keeps_them(tmp_path):
    model, tokens = CASE.build(torch.float32, num_nextn_predict_layers=1), some_tokens()
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and loaded.model.mtp[0].projection.weight.equal(
        model.model.mtp[0].projection.weight
    )
    backbone, report = hf_arch.find("deepseek").load("Model").from_pretrained(tmp_path, output_loading_info=True)
    assert not hasattr(backbone, "mtp") and not any("mtp" in name for name in report["unexpected_keys"])
    adapted = get_peft_model(model, hf_arch.lora_config(model, r=2)).train()
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    of_further = {name: weight for name, weight in adapted.named_parameters() if "mtp" in name and "lora_B" in name}
    assert {"kv_b_proj", "gate", "q_b_proj"} <= {part for name in of_further for part in name.split(".")}
    assert all(weight.grad is not None and weight.grad.any() for weight in of_further.values())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_group": 3}, "8 is not a multiple of n_group 3"),
        ({"topk_group": 3}, "topk_group 3 is not between 1 and n_group 2"),
        ({"topk_method": "greedy"}, "'greedy' knows no groups"),
        ({"n_group": 8}, "best two experts"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 is more than the 1 groups of 4"),
        ({"n_shared_experts": -1}, "n_shared_experts is -1"),
        ({"num_key_value_heads": 2}, "leave num_key_value_heads out"),
        ({"kv_lora_rank": -3}, "kv_lora_rank is -3"),
        ({"qk_rope_head_dim": 3}, "must be even"),
    ],
    ids=str,
)
def test_contradictory_configs_fail_at_construction(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        CASE.config(**fields)
