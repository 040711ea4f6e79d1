"""Hierarchical, expert-choice and soft mixtures: each is its paper's formula, document by document."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import get_peft_model
from torch.nn.functional import normalize
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import hf_arch
from hf_arch.bench import costs
from hf_arch.modeling.layers.sparse import SPARSE_FEED_FORWARDS
from promises import EXACT, Case, held_choices, some_tokens

FIELDS = {"num_local_experts": 6, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "mlp_bias": False}
GROUPS = FIELDS | {"num_expert_groups": 3, "num_groups_per_tok": 2}
ENCODER = Case(hf_arch.find("transformer"), "ForMaskedLM")
ROWS = {
    "plain": None,
    "padded": torch.tensor([[0] * 9 + [1] * 14, [1] * 23]),
    "packed": torch.tensor([[1] * 7 + [2] * 10 + [0] * 6, [1] * 4 + [2] * 1 + [3] * 18]),
    "segments": torch.arange(23) < torch.tensor([[23], [16]]),
}


def part(kind: str, **fields):
    """A feed-forward in float64, far from its beginning."""
    config = ENCODER.config(feed_forward_types=[kind] * 2, **GROUPS | fields)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    made = SPARSE_FEED_FORWARDS[kind](config, 0).double()
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_(std=0.4)
        if kind == "soft":
            made.router.scale.fill_(9.0)
    return made


def some_states() -> torch.Tensor:
    return torch.randn(2, 23, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def members(documents, row: int) -> list[list[int]]:
    """The places of the real tokens of each document of a row."""
    numbers = [1] * 23 if documents is None else documents[row].long().tolist()
    return [[place for place in range(23) if numbers[place] == number] for number in sorted({*numbers} - {0})]


def ask(held, expert: int, x: torch.Tensor) -> torch.Tensor:
    gate, up = (held.experts.gate_up_proj[expert] @ x.mT).chunk(2)
    return (held.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)).mT


def by_expert_choice(held, x: torch.Tensor, share: float) -> torch.Tensor:
    """arXiv:2202.09368, section 3.2, of one document [length, size]."""
    scores, answer = (x @ held.router.gate.weight.T).softmax(-1), torch.zeros_like(x)
    for expert in range(6):
        score, token = scores[:, expert].topk(math.ceil(share * len(x)))
        answer[token] += score[:, None] * ask(held, expert, x[token])
    return answer


def by_soft_mixture(held, x: torch.Tensor, slots: int) -> torch.Tensor:
    """arXiv:2308.00951, equations 1 to 3 with section 2.3, of one document [length, size]."""
    phi = held.router.scale * normalize(held.router.phi.T, dim=0)
    logits = normalize(x, dim=1) @ phi
    given = logits.softmax(0).T @ x
    answers = torch.cat([ask(held, expert, given[slots * expert : slots * (expert + 1)]) for expert in range(6)])
    return logits.softmax(1) @ answers


@torch.no_grad()
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("fields", [{}, {"expert_token_share": 0.3}, {"expert_token_share": 1}], ids=str)
def test_experts_choose_their_tokens_in_each_document(rows, fields):
    held, x, documents = part("expert_choice", **fields), some_states(), ROWS[rows]
    share, seen = fields.get("expert_token_share", 2 / 6), []
    held.choices.register_forward_hook(lambda module, told, answer: seen.append(answer.view(2, 23, 7)))
    found = held(x, documents=documents)
    for row in range(2):
        texts = members(documents, row)
        for places in texts:
            assert_close(found[row, places], by_expert_choice(held, x[row, places], share), **EXACT)
            taken = torch.stack([(seen[0][row, places] == expert).sum(-1) for expert in range(7)], dim=-1)
            assert (taken[:, :6].sum(0) == math.ceil(share * len(places))).all()  # equally busy
            assert torch.equal(taken[:, 6], (taken[:, :6].sum(-1) == 0).long()) and taken.max() == 1
            assert (seen[0][row, places, 0] >= 0).all()
        padding = sorted({*range(23)} - {place for places in texts for place in places})
        assert not found[row, padding].any() and (seen[0][row, padding] == -1).all()


@torch.no_grad()
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("slots", [1, 3])
def test_slots_are_means_of_a_document(rows, slots):
    held, x, documents = part("soft", slots_per_expert=slots), some_states(), ROWS[rows]
    found = held(x, documents=documents)
    for row in range(2):
        for places in members(documents, row):
            assert_close(found[row, places], by_soft_mixture(held, x[row, places], slots), **EXACT)
    if documents is not None:
        assert not found[documents == 0].any()


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"num_groups_per_tok": 1}, {"num_groups_per_tok": 3, "num_experts_per_tok": 6}])
def test_a_mixture_of_mixtures(fields):
    held, x = part("hierarchical", **fields), some_states().flatten(0, 1)
    taken, each = held.router.top_groups, held.router.top_k // held.router.top_groups
    logits = []
    held.router.logits.register_forward_hook(lambda module, told, answer: logits.append(answer))
    found = held(x[None])[0]
    for token, y in enumerate(x):
        of_groups = (held.router.group_gate.weight @ y).softmax(-1)
        within = (held.router.gate.weight @ y).view(3, 2).softmax(-1)
        assert_close(logits[0][token], (of_groups[:, None] * within).log().flatten(), **EXACT)
        expected = torch.zeros_like(y)
        for group in of_groups.topk(taken).indices:
            inner = torch.zeros_like(y)
            for expert in within[group].topk(each).indices:
                share = within[group, expert] / within[group].topk(each).values.sum()
                inner += share * ask(held, int(2 * group + expert), y[None])[0]
            expected += of_groups[group] / of_groups.topk(taken).values.sum() * inner
        assert_close(found[token], expected, **EXACT)


@pytest.mark.parametrize("kind", ["expert_choice", "soft"])
def test_all_tokens_are_seen_before_one_is_answered(kind, monkeypatch):
    """So no causal model may have them: a later token would change what an earlier one is answered, and does."""
    causal, fields = Case(hf_arch.find("retnet"), "ForCausalLM"), FIELDS | {"feed_forward_types": [kind] * 2}
    with pytest.raises(StrictDataclassError, match=f"{kind} compare all tokens.*one of sparse, switch, hierarchical"):
        causal.config(**fields)
    answering = Case(hf_arch.find("encoder_decoder"), "ForConditionalGeneration")
    with pytest.raises(StrictDataclassError, match="compare all tokens"):
        answering.config(**fields)
    monkeypatch.setattr(SPARSE_FEED_FORWARDS[kind], "sees_all", False)
    model, tokens = causal.build(**fields), some_tokens()
    changed = tokens.clone()
    changed[:, 40:] = 3 + changed[:, 40:] % 90
    with torch.no_grad():
        assert (model(changed).logits - model(tokens).logits)[:, :40].abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", ["expert_choice", "soft"])
def test_the_encoder_of_an_encoder_decoder_may_have_them(kind):
    case = Case(hf_arch.find("encoder_decoder"), "ForConditionalGeneration")
    model = case.build(**FIELDS, encoder_feed_forward_types=["gated", kind])
    assert isinstance(model.model.encoder.layers[1].feed_forward, SPARSE_FEED_FORWARDS[kind])
    source, answer = some_tokens(), some_tokens(length=9)
    expected = model(source, decoder_input_ids=answer).logits
    padded, mask = torch.cat((source[:, :5], source), 1), torch.ones(2, 75, dtype=torch.long)
    mask[:, :5] = 0
    assert_close(model(padded, attention_mask=mask, decoder_input_ids=answer).logits, expected, **EXACT)
    assert type(model.config).from_dict(model.config.to_dict()).to_dict() == model.config.to_dict()


def learns(model, told: dict) -> None:
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02), []
    for _ in range(6):
        loss = model.train()(**told).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


EVERYWHERE = [
    Case(hf_arch.find(name), head, kind, GROUPS | {"feed_forward_types": [kind] * layers})
    for name, head, kind, layers in (
        ("retnet", "ForCausalLM", "hierarchical", 2),
        ("s6", "ForCausalLM", "hierarchical", 2),
        ("hat", "ForMaskedLM", "hierarchical", 3),
        ("hat", "ForMaskedLM", "expert_choice", 3),
        ("hat", "ForMaskedLM", "soft", 3),
        ("transformer", "ForMaskedLM", "expert_choice", 2),
    )
]


@pytest.mark.parametrize("case", EVERYWHERE, ids=str)
def test_any_architecture_trains_generates_and_takes_adapters(case):
    model, tokens = case.build(), some_tokens(length=40)
    adapted = get_peft_model(model, hf_arch.lora_config(model, r=2)).double()
    reached = {name.split(".lora_")[0].rpartition(".")[-1] for name, _ in adapted.named_parameters() if "lora_" in name}
    gates = {"hierarchical": {"gate", "group_gate"}, "expert_choice": {"gate"}, "soft": set()}
    assert {name for name in reached if "gate" in name} == gates[case.variant] and "experts" in reached
    assert ("router" in reached) == (case.variant == "soft")  # its slots
    learns(adapted, {"input_ids": tokens, "labels": tokens})
    with torch.no_grad():
        expected = adapted.eval()(input_ids=tokens).logits
        assert_close(adapted.merge_and_unload()(tokens).logits, expected, **EXACT)
    learns(case.build(), {"input_ids": tokens, "labels": tokens})
    if case.head == "ForCausalLM":
        model = case.build()
        generated = model.generate(tokens, max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert torch.equal(generated[:, 40:], model(generated).logits[:, 39:-1].argmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hierarchical", "expert_choice", "soft"])
def test_precision_implementations_and_compilation(kind):
    fields = GROUPS | {"feed_forward_types": [kind] * 2, "initializer_range": 0.08}
    model, tokens = ENCODER.build(torch.float32, **fields), some_tokens()
    with held_choices():
        expected = model(tokens).logits
        for name in ("eager", "batched_mm", "grouped_mm"):
            model.set_experts_implementation(name)
            assert_close(model(tokens).logits, expected, atol=1e-4, rtol=1e-4)
        model.set_experts_implementation("sorted")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(tokens).logits
        low = model.to(torch.bfloat16)(tokens).logits
        for logits in (mixed, low):
            assert (logits - expected).std() < 0.05 * expected.std()
    fields |= {"feed_forward_types": [kind], "num_hidden_layers": 1}
    model, expected = ENCODER.build(**fields), ENCODER.build(**fields)(tokens).logits
    torch._dynamo.reset()
    assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(tokens).logits, expected, **EXACT)


def test_losses_of_routers_where_experts_choose():
    """They are equally busy: nothing asks for it; logits are to be small all the same. A soft mixture has no routes."""
    told = {"labels": some_tokens(), "output_router_logits": True, "input_ids": some_tokens()}

    def losses(*kinds, **fields):
        model = ENCODER.build(feed_forward_types=[*kinds], num_hidden_layers=len(kinds), **GROUPS | fields)
        outputs = model.model(some_tokens(), output_router_logits=True)
        found = model.model.routing_losses(outputs.router_logits, outputs.router_choices)
        added = model(**told).loss - model(**told | {"output_router_logits": False}).loss
        assert_close(added, found[1], atol=1e-5, rtol=1e-5, check_dtype=False)
        return outputs, found

    outputs, (balance, added) = losses("expert_choice", "soft")
    assert balance == added == 0 and len(outputs.router_logits) == len(outputs.router_choices) == 1
    outputs, (balance, added) = losses("expert_choice", "soft", router_z_loss_coef=0.1)
    assert balance == 0 and added > 0
    outputs, (balance, added) = losses("expert_choice", "soft", "hierarchical")
    chosen, probabilities = outputs.router_choices[1], outputs.router_logits[1].exp()
    busy = torch.nn.functional.one_hot(chosen, 6).sum(1).double().mean(0)
    assert_close(balance, 6 * (busy * probabilities.mean(0)).sum(), **EXACT)
    with pytest.raises(StrictDataclassError, match="those of type soft choose nothing"):
        ENCODER.config(feed_forward_types=["soft"] * 2, output_router_logits=True, **FIELDS)
    model = ENCODER.build(feed_forward_types=["soft"] * 2, **FIELDS)
    assert model(**told).loss == model(**told | {"output_router_logits": False}).loss


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_expert_groups": None}, "need num_expert_groups"),
        ({"num_expert_groups": 4}, "6 cannot be dealt to num_expert_groups 4 alike"),
        ({"num_groups_per_tok": 4}, "num_groups_per_tok 4 is not between 1 and num_expert_groups 3"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok 3 must be num_groups_per_tok 2 times 1 to 2"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok 6 must be"),
        ({"expert_token_share": 0}, "expert_token_share is 0; it must be over 0"),
        ({"expert_token_share": 1.5}, "at most 1"),
        ({"slots_per_expert": 0}, "slots_per_expert is 0"),
    ],
    ids=str,
)
def test_contradictory_fields_fail_at_construction(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        ENCODER.config(**GROUPS | {"feed_forward_types": ["hierarchical"] * 2} | fields)


@torch.no_grad()
def test_one_expert_that_takes_all_is_the_dense_feed_forward():
    fields = {"num_local_experts": 1, "num_experts_per_tok": 1, "feed_forward_types": ["expert_choice"] * 2}
    dense = ENCODER.build()
    model = hf_arch.upcycle(dense, experts=1, experts_per_token=1)
    chosen = ENCODER.build(**fields)
    chosen.load_state_dict(model.state_dict())
    assert_close(chosen(some_tokens()).logits, dense(some_tokens()).logits, **EXACT)


@torch.no_grad()
def test_capacity_counts_the_experts_of_all_processes():
    """Where experts are dealt out, a process has fewer than tokens may choose among."""
    held, x = part("hierarchical", eval_capacity_factor=0.5).eval(), some_states()
    seen = []
    held.choices.register_forward_hook(lambda module, told, answer: seen.append(answer))
    held(x)
    held.experts.num_experts = 3
    held(x)
    assert torch.equal(seen[0], seen[1]) and (seen[0] == 6).any()


@torch.no_grad()
@pytest.mark.parametrize("kind", SPARSE_FEED_FORWARDS)
def test_the_bench_counts_what_is_computed(kind):
    held, x = part(kind, slots_per_expert=2, expert_token_share=0.3), some_states()[:1]
    with FlopCounterMode(display=False) as counter:
        held(x)
    assert costs.cost(held, costs.Span(23)).operations == counter.get_total_flops()
