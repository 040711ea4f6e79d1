"""Mixture-of-Depths answers as equation 1 of its paper says, restated here token by token; in evaluation its predictor
decides, and what no one chose costs nothing."""

import math

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from hf_arch import find
from hf_arch.bench import costs
from hf_arch.bench.worker.serve import ON_CPU
from hf_arch.modeling.layers import routed_view
from hf_arch.modeling.layers.routed_view import RoutedView
from hf_arch.modeling.ops.token_choice import rows_of, top_share
from promises import EXACT, Case, some_tokens

ROW = find("mixture_of_depths")
EVERYWHERE = {"layer_types": ["routed_attention"] * 3, "num_hidden_layers": 3}
PACKED = (30, 3, 37)


def depths(**fields):
    return Case(ROW, "ForCausalLM", fields=fields).build()


def attention(mixer, x, positions, rate):
    """Each token looks at those before it, at their places in the text."""
    heads = {name: getattr(mixer, f"{name}_proj")(x).unflatten(-1, (-1, mixer.head_dim)) for name in "qkv"}
    angle = (positions[:, None] * rate).repeat(1, 2)[:, None]
    for name in "qk":
        first, second = heads[name].chunk(2, dim=-1)
        heads[name] = heads[name] * angle.cos() + torch.cat((-second, first), dim=-1) * angle.sin()
    key, value = (heads[name].repeat_interleave(mixer.num_key_value_groups, dim=1) for name in "kv")
    outputs = []
    for t in range(len(x)):
        scores = torch.einsum("hd,khd->hk", heads["q"][t], key[: t + 1]) / mixer.head_dim**0.5
        outputs.append(torch.einsum("hk,khd->hd", scores.softmax(-1), value[: t + 1]).flatten())
    return mixer.o_proj(torch.stack(outputs))


def f(layer, x, positions, rate):
    """Self-attention and the feed-forward, without the residual around both."""
    norm = layer.residual.norm
    attended = attention(layer.mixer, norm["mixer"](x), positions, rate)
    return attended + layer.feed_forward(norm["feed_forward"](x + attended))


def by_the_paper(model, ids, choose):
    """One text [length]: `choose(layer, x, weights)` names the tokens of a routed layer, in order."""
    x, positions, rate = model.model.embed_tokens(ids), torch.arange(len(ids)), model.model.embed_positions.inv_freq
    for layer, kind in zip(model.model.layers, model.config.layer_types, strict=True):
        if kind == "full_attention":
            x = x + f(layer, x, positions, rate)
            continue
        weights = x @ layer.view.gate.weight[0]
        chosen = choose(layer, x, weights)
        answers = dict(zip(chosen, f(layer, x[chosen], positions[chosen], rate), strict=True)) if chosen else {}
        x = torch.stack([x[t] + weights[t] * answers[t] if t in answers else x[t] for t in range(len(ids))])
    return model.lm_head(model.model.norm(x))


def highest(model):
    """Of the whole text, as in training."""

    def choose(layer, x, weights):
        count = math.ceil(model.config.capacity * len(x))
        return sorted(sorted(range(len(x)), key=lambda t: (-weights[t].item(), t))[:count])

    return choose


def predicted(layer, x, weights):
    """Token by token, as otherwise."""
    scores = layer.view.predictor
    even = (token / (token.square().mean() + scores.eps).sqrt() for token in x)
    odds = [scores.out_proj(F.silu(scores.in_proj(token))).sigmoid() for token in even]
    return [t for t, odd in enumerate(odds) if odd > 0.5]


@pytest.mark.parametrize(
    "fields", [{}, {"capacity": 0.125, "num_key_value_heads": None}, EVERYWHERE | {"capacity": 0.3}], ids=str
)
@torch.no_grad()
def test_equals_equation_1(fields, tokens):
    model = depths(**fields)
    expected = [by_the_paper(model, row, predicted) for row in tokens]
    assert_close(model(tokens).logits, torch.stack(expected), **EXACT)
    tokens = torch.stack([torch.randperm(93)[:70] + 3 for _ in range(2)])  # equal ones tie where nothing is before them
    expected = [by_the_paper(model, row, highest(model)) for row in tokens]
    assert_close(model.train()(tokens).logits, torch.stack(expected), **EXACT)


@torch.no_grad()
def test_in_training_each_document_has_a_share_of_its_own(tokens):
    model = depths(capacity=0.3).train()
    alone = [
        torch.stack([by_the_paper(model, row, highest(model)) for row in piece]) for piece in tokens.split(PACKED, 1)
    ]
    padded = torch.cat((tokens[:, :4], tokens, tokens[:, :6]), dim=1)
    positions = torch.cat([torch.arange(size) for size in (4, *PACKED, 6)])[None].expand(2, -1)
    mask = torch.ones_like(padded)
    mask[:, :4] = mask[:, -6:] = 0
    found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:-6]
    assert_close(found, torch.cat(alone, dim=1), **EXACT)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_all_tokens_are_computed_alike_where_shapes_are_fixed(attention, training, tokens, monkeypatch):
    model = depths(**EVERYWHERE | {"capacity": 0.4}).train(training)
    model.set_attn_implementation(attention)
    positions = torch.cat([torch.arange(size) for size in PACKED])[None].expand(2, -1)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    told = ({"position_ids": positions}, {"attention_mask": mask}, {} if training else {"use_cache": False})
    expected = [model(tokens, **each).logits for each in told]
    monkeypatch.setattr(routed_view, "is_tracing", lambda x: True)
    close = EXACT if attention == "sdpa" else {"atol": 1e-5, "rtol": 1e-4}  # transformers' softmax is in float32
    for each, logits in zip(told, expected, strict=True):
        assert_close(model(tokens, **each).logits[:, 9:], logits[:, 9:], **close)


def test_everyone_at_weight_one_is_the_transformer(tokens):
    model = depths(capacity=1.0, **EVERYWHERE).train()
    for layer in model.model.layers:
        layer.view.gate.forward = lambda x: torch.ones_like(x[..., :1])
    row = find("transformer")
    dense = row.load("ForCausalLM")(row.tiny_config("ForCausalLM", num_hidden_layers=3)).double()
    report = dense.load_state_dict(model.state_dict(), strict=False)
    assert not report.missing_keys and all(".view." in name for name in report.unexpected_keys)
    assert_close(model(tokens).logits, dense(tokens).logits, **EXACT)


@torch.no_grad()
def test_a_share_of_the_whole_text_leaks_the_future_and_the_predictor_does_not(tokens):
    model, changed = depths(), tokens.clone()
    changed[:, 60:] = (changed[:, 60:] + 7) % 90 + 3
    assert_close(model(changed).logits[:, :60], model(tokens).logits[:, :60], **EXACT)
    model.train()
    assert (model(changed).logits[:, :60] - model(tokens).logits[:, :60]).abs().max() > 0.1


@torch.no_grad()
def test_the_cache_holds_what_was_chosen_and_rows_differ():
    model, seen = depths(), []
    view = model.model.layers[1].view
    view.predictor.register_forward_hook(lambda module, inputs, scores: seen.append(scores > 0))
    tokens = some_tokens(seed=3)
    cache = model(tokens[:, :50], use_cache=True).past_key_values
    held = cache.layers[1]
    counts = seen[0].sum((1, 2))
    assert held.states["memory_count"].tolist() == counts.tolist() and held.get_seq_length() == 50
    assert held.states["memory_key"].shape[2] == 1 + counts.max() < 50
    for t in range(50, 70):
        model(tokens[:, t : t + 1], past_key_values=cache)
    counts = torch.cat(seen, dim=1).sum((1, 2))
    assert held.states["memory_count"].tolist() == counts.tolist() and counts[0] != counts[1]


def leave_out(model):
    for layer in model.model.layers:
        if hasattr(layer.view, "predictor"):
            torch.nn.init.constant_(layer.view.predictor.out_proj.bias, -1e3)
    return model


def test_what_no_one_chose_costs_nothing_and_breaks_nothing(tokens):
    model = leave_out(depths())
    with torch.no_grad():
        expected = torch.stack([by_the_paper(model, row, predicted) for row in tokens])
        step = model(tokens[:, :60], use_cache=True)
        assert_close(step.logits, expected[:, :60], **EXACT)
        assert not step.past_key_values.layers[1].states and step.past_key_values.layers[1].get_seq_length() == 60
        with FlopCounterMode(display=False) as counter:
            rest = model(tokens[:, 60:], past_key_values=step.past_key_values)
        assert_close(rest.logits, expected[:, 60:], **EXACT)
        inside = [name for name in counter.get_flop_counts() if "layers.1." in name]
        assert inside and not [name for name in inside if ".mixer" in name or ".feed_forward" in name]
        model.generate(tokens, max_new_tokens=3, num_beams=2)
    model(tokens, labels=tokens).loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.any() == ("layers.1." not in name), name
    assert_close(model(tokens, use_cache=True).logits, expected, **EXACT)


@torch.no_grad()
def test_only_what_is_chosen_is_computed(monkeypatch):
    monkeypatch.setattr(costs, "visible_pairs", lambda span, *kind: span.tokens * span.tokens)  # as torch counts
    monkeypatch.setattr(RoutedView, "decide", lambda self, scores: torch.arange(scores.shape[1])[:, None] % 4 == 0)
    model = depths(capacity=0.25).float()
    for asked in (model.eval(), model.train()):
        with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
            asked(torch.full((1, 256), 5), use_cache=False)
        expected = costs.cost(asked, costs.Span(256)).operations
        assert 0.97 * expected < counter.get_total_flops() < 1.01 * expected
    assert expected < 0.75 * costs.cost(depths(capacity=1.0), costs.Span(256)).operations


@torch.no_grad()
def test_a_row_for_which_nothing_is_chosen_is_no_row():
    chosen = torch.zeros(3, 8, dtype=torch.bool)
    chosen[2, [1, 5, 6]] = True
    rows = rows_of(chosen)
    assert rows.index.tolist() == [[17, 21, 22]] and rows.batch_row.tolist() == [2] and rows.real is None


def test_the_predictor_learns_what_the_router_chooses_and_nothing_else_does(tokens):
    model, kept = depths(**EVERYWHERE).train(), []
    for layer in model.model.layers:
        layer.view.register_forward_pre_hook(lambda module, inputs: kept.append((module, inputs[0].detach())))
    mask = torch.ones_like(tokens)
    mask[1, 50:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    outputs = model(tokens, attention_mask=mask, labels=labels)
    plain = model(tokens, attention_mask=mask)
    loss = F.cross_entropy(plain.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    total = 0
    for view, x in kept[:3]:
        scores, weight = view.predictor(x)[..., 0], view.gate(x)[..., 0]
        chosen = top_share(weight, 0.5, mask)
        assert chosen.sum(1).tolist() == [35, 25]
        total = total + F.binary_cross_entropy_with_logits(scores, chosen.double(), reduction="none")[mask > 0].sum()
    assert_close(outputs.predictor_loss, total.detach() / 120, **EXACT)
    assert_close(outputs.loss, loss + total / 118, check_dtype=False, atol=1e-5, rtol=1e-5)
    of = dict(model.named_parameters())
    found = torch.autograd.grad(outputs.loss, of.values())
    expected = torch.autograd.grad(loss.float() + total / 118, of.values(), materialize_grads=True)
    assert_close(found, expected, atol=1e-7, rtol=1e-5)
    without = torch.autograd.grad(model(tokens, attention_mask=mask).logits.sum(), of.values())
    assert not any(grad.any() for name, grad in zip(of, without, strict=True) if "predictor" in name)


def text(draw: torch.Generator, rows: int) -> torch.Tensor:
    """Tokens that follow each other in runs of seven, with some noise: there is something to learn."""
    ids = torch.randint(3, 80, (rows, 1), generator=draw) + torch.arange(40) % 7
    return torch.where(torch.rand(rows, 40, generator=draw) < 0.1, 91, ids)


def test_a_trained_predictor_agrees_with_the_router():
    model, draw = depths().float().train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        ids = text(draw, 4)
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    view, kept, ids = model.model.layers[1].view, [], text(draw, 16)
    view.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        found = model(ids, labels=ids)
        agree = top_share(view.gate(kept[0])[..., 0], 0.5) == (view.predictor(kept[0])[..., 0] > 0)
        assert agree.double().mean() > 0.75
        assert_close(model.eval()(ids, labels=ids).loss, found.loss - found.predictor_loss, atol=0.05, rtol=0)


def test_equal_scores_and_round_shares():
    assert top_share(torch.zeros(1, 30), 0.1).sum() == 3  # 0.1 * 30 is more than 3 in floating point
    documents = torch.tensor([[0, 1, 1, 1, 2, 0, 3, 3, 3, 3, 0]])
    scores = torch.tensor([[9.0, 1, 1, 0, -5, 9, 1, 2, 2, 2, 9]])
    assert top_share(scores, 0.5, documents).nonzero()[:, 1].tolist() == [1, 2, 4, 7, 8]
    assert top_share(scores[:, 1:5], 0.5).nonzero()[:, 1].tolist() == [0, 1]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"capacity": 0.0}, "capacity is 0.0"),
        ({"capacity": 1.5}, "capacity is 1.5"),
        ({"predictor_size": 0}, "predictor_size is 0"),
    ],
    ids=str,
)
def test_contradictory_configs_are_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        ROW.tiny_config(**fields)
