"""Sparse feed-forwards: every way to compute experts is the definition, and the loss keeps them equally busy."""

import itertools
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

import hf_arch
from hf_arch.modeling.layers.experts import SORTED, DenseExperts, Experts, SideBySide
from hf_arch.modeling.layers.sparse import SparseFeedForward, come_late
from hf_arch.modeling.skeleton.backbone import Layer
from hf_arch.modeling.skeleton.routing import load_balancing, router_z
from promises import EXACT, MODELS, ROWS, Case, held_choices, some_tokens


def with_experts(case: Case) -> Case:
    fields = {"feed_forward_types": ["sparse"] * case.config().num_hidden_layers, "num_local_experts": 4}
    return Case(case.row, case.head, "experts", fields | {"mlp_bias": False})


ANY = [with_experts(case) for case in MODELS if "sparse" in case.config().feed_forward_kinds]
KINDS = {"sparse": (Experts, "gated"), "switch": (DenseExperts, "dense")}
MIXTRAL = Case(hf_arch.find("mixtral"), "ForCausalLM")


def experts(count: int = 5, dtype=torch.float64, kind: type[SideBySide] = Experts) -> SideBySide:
    config = MIXTRAL.config(num_local_experts=count, moe_intermediate_size=24)
    config._experts_implementation = SORTED
    torch.manual_seed(0)
    made = kind(config)
    made.init_parameters(0.3)
    return made.to(dtype)


def some_choices(tokens: int, choices: int, among: int, dtype) -> tuple[torch.Tensor, ...]:
    """Tokens, the experts that each takes, out of the first `among`, and their weights."""
    draw = torch.Generator().manual_seed(2)
    scores = torch.rand(tokens, among, generator=draw, dtype=dtype)
    weight, index = scores.topk(choices, dim=-1)
    return torch.randn(tokens, 32, generator=draw, dtype=dtype), index, weight


def answer_and_gradients(module: SideBySide, implementation: str, tokens, index, weight) -> list[torch.Tensor]:
    module.config._experts_implementation = implementation
    tokens, weight = (each.clone().requires_grad_() for each in (tokens, weight))
    output = module(tokens, index, weight)
    learned = (tokens, weight, *module.parameters())
    return [output, *torch.autograd.grad(output.pow(2).sum(), learned, allow_unused=True)]


@pytest.mark.parametrize("tokens, choices, among", [(1, 1, 5), (1, 2, 3), (70, 2, 5), (70, 5, 5), (9, 2, 2), (3, 1, 1)])
@pytest.mark.parametrize("implementation", [SORTED, "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", [Experts, DenseExperts])
def test_every_form_is_the_definition(kind, implementation, tokens, choices, among):
    """Also where no token takes the last experts: they get a gradient of zeros, not none."""
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64
    module, told = experts(dtype=dtype, kind=kind), some_choices(tokens, choices, among, dtype)
    expected = answer_and_gradients(module, "eager", *told)
    found = answer_and_gradients(module, implementation, *told)
    close = EXACT if dtype == torch.float64 else {"atol": 1e-4, "rtol": 1e-4}
    for mine, other in zip(found, expected, strict=True):
        assert_close(mine, other, **close)
    assert all(not gradient[among:].any() for gradient in found[3:])


@pytest.mark.parametrize("marked", [0.5, 1.0])
def test_choices_that_other_processes_compute_are_left_out(marked):
    module, (tokens, index, weight) = experts(), some_choices(40, 2, 5, torch.float64)
    away = torch.rand(index.shape, generator=torch.Generator().manual_seed(3)) < marked
    told = tokens, torch.where(away, module.num_experts, index), torch.where(away, 0.0, weight)
    for mine, other in zip(
        answer_and_gradients(module, SORTED, *told), answer_and_gradients(module, "eager", *told), strict=True
    ):
        assert_close(mine, other, **EXACT)


def test_the_definition_is_the_formula():
    module, (tokens, index, weight) = experts(), some_choices(7, 2, 5, torch.float64)
    module.config._experts_implementation = "eager"
    found = module(tokens, index, weight)
    for row, x in enumerate(tokens):
        expected = torch.zeros_like(x)
        for expert, share in zip(index[row], weight[row], strict=True):
            gate, up = (module.gate_up_proj[expert] @ x).chunk(2)
            expected += share * (module.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
        assert_close(found[row], expected, **EXACT)


def test_a_token_costs_its_own_experts_alone():
    def operations(count: int) -> int:
        module = experts(count, torch.float32)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(*some_choices(64, 2, count, torch.float32))
        return counter.get_total_flops()

    assert operations(4) == operations(16) == 64 * 2 * 2 * 3 * 32 * 24


@pytest.mark.parametrize("case", ANY, ids=str)
def test_any_architecture_trains_and_generates_with_experts(case):
    model = case.build(torch.float32, output_router_logits=True).train()
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    assert all(isinstance(layer.feed_forward, SparseFeedForward) for layer in layers)
    optimizer, tokens, losses = torch.optim.AdamW(model.parameters(), lr=0.01), some_tokens(length=40), []
    for _ in range(8):
        outputs = model(tokens, labels=tokens)
        outputs.loss.backward()
        assert all(weight.grad is not None for weight in model.parameters())
        optimizer.step(), optimizer.zero_grad()
        losses.append(outputs.loss.item())
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        whole, alone = (model.eval()(tokens, labels=tokens, output_router_logits=told).loss for told in (True, False))
    assert whole > alone  # the loss that balances is there, under every head
    if case.head == "ForCausalLM":
        assert len(outputs.router_logits) == len(outputs.router_choices) == len(layers)
        greedy = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        generated = model.generate(tokens, **greedy)
        assert torch.equal(generated[:, 40:], model(generated).logits[:, 39:-1].argmax(-1))
    assert type(hf_arch.lora_config(model).target_parameters) is list


@torch.no_grad()
@pytest.mark.parametrize("kind, dense", [(kind, dense) for kind, (_, dense) in KINDS.items()])
def test_one_expert_is_the_dense_feed_forward(kind, dense):
    fields = {"num_local_experts": 1, "num_experts_per_tok": 1, "feed_forward_types": [kind] * 2}
    sparse = MIXTRAL.build(**fields)
    plain = MIXTRAL.build(num_local_experts=None, feed_forward_types=[dense] * 2)
    weights = {
        name: weight for name, weight in sparse.state_dict().items() if ".feed_forward." not in name or "norm" in name
    }
    for layer in range(2):
        held = sparse.model.layers[layer].feed_forward.experts
        name = f"model.layers.{layer}.feed_forward"
        firsts = held.first_proj[0].chunk(len(held.first_parts))
        for part, weight in zip(held.first_parts, firsts, strict=True):
            weights[f"{name}.{part}.weight"] = weight
        weights[f"{name}.down_proj.weight"] = held.down_proj[0]
    plain.load_state_dict(weights)
    assert_close(sparse(some_tokens()).logits, plain(some_tokens()).logits, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_experts_have_no_order(kind):
    model = MIXTRAL.build(feed_forward_types=[kind] * 2)
    expected, order = model(some_tokens()).logits, torch.tensor([2, 0, 3, 1])
    for layer in model.model.layers:
        held = layer.feed_forward
        for weight in (held.router.gate.weight, held.experts.first_proj, held.experts.down_proj):
            weight.copy_(weight[order])
    assert_close(model(some_tokens()).logits, expected, **EXACT)


@pytest.mark.parametrize("factor", [0.3, 1.0, 1.5])
@pytest.mark.parametrize("rows", ["plain", "padded", "packed"])
def test_the_late_are_those_who_find_their_expert_full(rows, factor):
    draw = torch.Generator().manual_seed(0)
    index = torch.rand(2, 23, 4, generator=draw).topk(2, dim=-1).indices
    documents = {
        "plain": None,
        "padded": torch.tensor([[0] * 9 + [1] * 14, [1] * 23]),
        "packed": torch.tensor([[1] * 7 + [2] * 10 + [0] * 6, [1] * 4 + [2] * 9 + [3] * 10]),
    }[rows]
    expected = torch.zeros(2, 23, 2, dtype=torch.bool)
    for row in range(2):
        numbers = [1] * 23 if documents is None else documents[row].tolist()
        for document in set(numbers) - {0}:
            members, taken = [place for place in range(23) if numbers[place] == document], [0] * 4
            for choice, place in itertools.product(range(2), members):
                expert = int(index[row, place, choice])
                taken[expert] += 1
                expected[row, place, choice] = taken[expert] > math.ceil(factor * 2 * len(members) / 4)
    assert torch.equal(come_late(index, documents, factor, 4), expected.flatten(0, 1))
    assert expected.any() or factor > 1


def test_capacity_drops_in_training_alone():
    """Who comes too late is answered nothing; room for every token drops none."""
    fields = {"feed_forward_types": ["switch"] * 2, "num_experts_per_tok": 1, "expert_capacity_factor": 0.5}
    model, tokens = MIXTRAL.build(**fields), some_tokens()
    asked = {"output_router_logits": True}
    free = model(tokens, **asked)
    assert all((choices < 4).all() for choices in free.router_choices)
    limited = model.train()(tokens, **asked)
    late = limited.router_choices[0] == 4
    assert late.float().mean() >= 0.5
    answers = []
    model.model.layers[0].feed_forward.register_forward_hook(lambda module, told, answer: answers.append(answer))
    model(tokens)
    assert torch.equal((answers[0] == 0).all(-1), late.view(2, -1))
    for layer in model.model.layers:
        layer.feed_forward.capacity_factor[True] = 4.0
    assert_close(model(tokens).logits, free.logits, **EXACT)


@torch.no_grad()
def test_routers_of_switch_compute_in_float32_and_jitter_in_training():
    fields = {"feed_forward_types": ["switch"] * 2, "num_experts_per_tok": 1, "router_jitter_noise": 0.1}
    model, tokens = MIXTRAL.build(torch.bfloat16, **fields), some_tokens()
    seen = []
    router = model.model.layers[0].feed_forward.router
    router.register_forward_hook(lambda module, told, answer: seen.append(told[0]))
    logits = model(tokens, output_router_logits=True).router_logits[0]
    assert logits.dtype == torch.float32
    assert_close(logits, seen[0].float() @ router.gate.weight.float().T)
    first, second = (model.train()(tokens, output_router_logits=True).router_logits[0] for _ in range(2))
    assert not torch.equal(first, second)
    assert_close(first, logits, rtol=0.2, atol=0.2 * logits.abs().max())


@torch.no_grad()
def test_implementations_are_chosen_by_name_and_ours_by_default():
    model = ANY[0].build(torch.float32)
    assert model.config._experts_implementation == SORTED
    expected = model(some_tokens()).logits
    with held_choices():
        for name in ("eager", "batched_mm", "grouped_mm"):
            model.set_experts_implementation(name)
            assert model.config._experts_implementation == name
            assert_close(model(some_tokens()).logits, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="not supported"):
        model.set_experts_implementation("guessed")
    dense = ROWS[0].build()
    dense.set_experts_implementation("eager")
    assert type(dense)._can_set_experts_implementation() is False
    with pytest.raises(ValueError, match="does not support setting experts"):
        dense.set_experts_implementation("grouped_mm")


@pytest.mark.parametrize("top_k", [1, 2])
def test_load_balancing_is_that_of_transformers(top_k):
    draw = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(2 * 35, 6, generator=draw) for _ in range(3))
    mask = (torch.rand(2, 35, generator=draw) < 0.7).long()
    choose = [lambda scores: scores.topk(top_k).indices] * 3
    assert_close(load_balancing(logits, choose), load_balancing_loss_func(logits, 6, top_k))
    expected = load_balancing_loss_func(logits, 6, top_k, mask)
    assert_close(load_balancing(logits, choose, [mask.flatten().bool()] * 3), expected)
    even = (torch.eye(6).repeat(4, 1) * 1e-3,)  # all experts are as likely, and as often taken
    likeliest = [lambda scores: scores.argmax(-1, keepdim=True)]
    assert_close(load_balancing(even, likeliest), torch.tensor(1.0), atol=1e-3, rtol=0)
    assert load_balancing((torch.eye(6)[:1].repeat(24, 1) * 9,), likeliest) > 5


def test_the_z_loss_is_that_of_transformers():
    draw = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(2 * 35, 6, generator=draw) for _ in range(3))
    there = [torch.ones(70, dtype=torch.bool)] * 3
    assert_close(router_z(logits, there), router_z_loss_func(torch.stack(logits)))
    model, tokens = MIXTRAL.build(output_router_logits=True), some_tokens()
    plain = model(tokens, labels=tokens)
    model.config.router_z_loss_coef = 0.1
    expected = plain.loss.double() + 0.1 * router_z_loss_func(torch.stack(plain.router_logits))
    assert_close(model(tokens, labels=tokens).loss.double(), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_does_not_count_in_load_balancing():
    model, tokens = MIXTRAL.build(), some_tokens()
    told = {"output_router_logits": True}
    alone = model(tokens[:, :50], labels=tokens[:, :50], **told)
    for side in ("left", "right"):
        pieces = (tokens[:, 50:], tokens[:, :50])
        padded = torch.cat(pieces if side == "left" else pieces[::-1], dim=1)
        mask = torch.ones_like(tokens)
        mask[:, slice(0, 20) if side == "left" else slice(50, None)] = 0
        labels = padded.masked_fill((mask == 0) | (mask.cumsum(-1) == 1), -100)  # padding names no first token
        found = model(padded, attention_mask=mask, labels=labels, **told)
        assert_close(found.aux_loss, alone.aux_loss, **EXACT)
        assert torch.equal(found.router_choices[0][:, 0].view(2, -1) == -1, mask == 0)
        assert_close(found.loss, alone.loss, atol=1e-5, rtol=1e-5)
    cache = model(padded[:, :30], attention_mask=mask[:, :30], use_cache=True).past_key_values
    rest = model(padded[:, 30:], attention_mask=mask, past_key_values=cache, **told)
    new = [logits.view(2, -1, 4)[:, 30:50].flatten(0, 1) for logits in found.router_logits]
    assert_close(rest.aux_loss, load_balancing(new, [lambda scores: scores.topk(2).indices] * 2), **EXACT)


def test_pieces_of_a_batch_add_their_share():
    model, tokens = MIXTRAL.build(output_router_logits=True), some_tokens()
    whole = model(tokens, labels=tokens)
    plain = model(tokens, labels=tokens, output_router_logits=False)
    assert plain.aux_loss is None and plain.router_logits is None
    share = model(tokens, labels=tokens, num_items_in_batch=4 * 2 * 69)
    assert_close(4 * share.loss, whole.loss, atol=1e-5, rtol=1e-5)
    assert_close((whole.loss - plain.loss).double(), 0.001 * whole.aux_loss, atol=1e-6, rtol=1e-4)
    assert model(tokens).loss is None and model(tokens).aux_loss is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_load_balancing_under_checkpointing(reentrant):
    """Reentrant checkpointing cuts the graph between routers and loss: that is said, not passed over."""
    tokens = some_tokens()

    def gradient(**options):
        model = MIXTRAL.build(output_router_logits=True, router_aux_loss_coef=1.0).train()
        if options:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model(tokens, labels=tokens).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    if reentrant:
        with pytest.raises(ValueError, match="use_reentrant=False"):
            gradient(use_reentrant=True)
    else:
        assert_close(gradient(use_reentrant=False), gradient(), **EXACT)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_local_experts": None}, "sparse need num_local_experts"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 is not between 1 and num_local_experts 4"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok 0"),
        ({"feed_forward_types": ["dense"]}, "no feed-forward is sparse"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
        ({"router_aux_loss_coef": -0.1}, "must not be negative"),
        ({"mlp_bias": True}, "Experts have no bias"),
        ({"expert_capacity_factor": 0.0}, "must be positive"),
        ({"router_z_loss_coef": -1.0}, "must not be negative"),
        ({"router_jitter_noise": 1.0}, "below 1"),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ANY, ids=str)
def test_contradictory_experts_fail_at_construction(case, fields, message):
    kinds = fields.get("feed_forward_types", ["sparse"]) * case.config().num_hidden_layers
    with pytest.raises(StrictDataclassError, match=message):
        case.config(**fields | {"feed_forward_types": kinds})


def test_dense_configs_do_not_speak_of_experts():
    dense, sparse = ROWS[0].config(), ANY[0].config()
    assert "num_local_experts" not in dense.to_dict() and "base_model_ep_plan" not in sparse.to_dict()
    assert type(sparse).from_dict(sparse.to_dict()).to_dict() == sparse.to_dict()
    with pytest.raises(StrictDataclassError, match="output_router_logits"):
        ROWS[0].config(output_router_logits=True)


def test_adapters_of_experts_refuse_dropout():
    model = MIXTRAL.build()
    with pytest.raises(ValueError, match="target_parameters=None"):
        hf_arch.lora_config(model, lora_dropout=0.1)
    assert hf_arch.lora_config(model, lora_dropout=0.1, target_parameters=None).lora_dropout == 0.1
