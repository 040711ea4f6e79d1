"""Early exits answer as CALM says, restated here token by token, and cost no more than what is left to do."""

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from hf_arch import find
from hf_arch.modeling.layers import early_exit
from promises import EXACT, Case, held_choices, new_cache

ROW = find("mixture_of_depths")
FIELDS = {"layer_types": ["early_exit_attention"] * 4, "num_hidden_layers": 4}
# With random weights, so that tokens leave after each of the layers
CLASSIFIER = {"exit_confidence": "classifier", "early_exit_threshold": 0.7}
SATURATION = {"exit_confidence": "saturation", "early_exit_threshold": 0.6}


def leaving(**fields):
    return Case(ROW, "ForCausalLM", fields=FIELDS | fields).build()


def turned(x, angle):
    first, second = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat((-second, first), dim=-1) * angle.sin()


def by_the_paper(model, ids):
    """One text, token by token through the layers: a token that has left gives later layers what it was then."""
    config, kept, logits, depths = model.config, [[] for _ in model.model.layers], [], []
    for place, token in enumerate(ids):
        x, depth = model.model.embed_tokens(token), None
        angle = (place * model.model.embed_positions.inv_freq).repeat(2)
        for i, layer in enumerate(model.model.layers):
            mixer, norm = layer.mixer, layer.residual.norm
            seen = norm["mixer"](x)
            query, key, value = (getattr(mixer, f"{name}_proj")(seen).view(-1, mixer.head_dim) for name in "qkv")
            kept[i].append((turned(key, angle), value))
            if depth is not None:
                continue
            keys, values = (
                torch.stack(held).repeat_interleave(mixer.num_key_value_groups, dim=1)
                for held in zip(*kept[i], strict=True)
            )
            scores = torch.einsum("hd,khd->hk", turned(query, angle), keys) / mixer.head_dim**0.5
            answer = x + mixer.o_proj(torch.einsum("hk,khd->hd", scores.softmax(-1), values).flatten())
            answer = answer + layer.feed_forward(norm["feed_forward"](answer))
            if i < config.num_hidden_layers - 1:
                sure = torch.dot(x, answer) / x.norm() / answer.norm()
                if config.exit_confidence == "classifier":
                    sure = layer.view.gate(answer).sigmoid()
                depth = i + 1 if sure > config.early_exit_threshold else None
            x = answer
        logits.append(model.lm_head(model.model.norm(x)))
        depths.append(depth or config.num_hidden_layers)
    return torch.stack(logits), depths


@pytest.mark.parametrize("fields", [CLASSIFIER, SATURATION], ids=lambda fields: fields["exit_confidence"])
@torch.no_grad()
def test_equals_the_paper(fields, tokens, monkeypatch):
    model = leaving(**fields)
    expected = [by_the_paper(model, row) for row in tokens]
    found = model(tokens)
    assert_close(found.logits, torch.stack([logits for logits, _ in expected]), **EXACT)
    assert found.depths.tolist() == [depths for _, depths in expected]
    assert {*found.depths.flatten().tolist()} == {1, 2, 3, 4}
    cache = new_cache(model)
    pieces = [model(piece, past_key_values=cache) for piece in tokens.split((30, 1, 1, 8, 30), dim=1)]
    assert_close(torch.cat([piece.logits for piece in pieces], dim=1), found.logits, **EXACT)
    assert torch.cat([piece.depths for piece in pieces], dim=1).equal(found.depths)
    monkeypatch.setattr(early_exit, "is_tracing", lambda x: True)  # then all tokens go through all layers
    again = model(tokens)
    assert_close(again.logits, found.logits, **EXACT)
    assert again.depths.equal(found.depths)


@torch.no_grad()
def test_who_never_leaves_is_in_the_transformer(tokens):
    model = leaving(early_exit_threshold=1.0)
    row = find("transformer")
    dense = row.load("ForCausalLM")(row.tiny_config("ForCausalLM", num_hidden_layers=4)).double()
    report = dense.load_state_dict(model.state_dict(), strict=False)
    assert not report.missing_keys and all(".view.gate." in name for name in report.unexpected_keys)
    assert_close(model(tokens).logits, dense(tokens).logits, **EXACT)


@torch.no_grad()
def test_who_has_left_costs_keys_and_values_alone(tokens):
    model = leaving(early_exit_threshold=0.0)  # all leave after the first layer
    step = model(tokens[:, :69], use_cache=True)
    with FlopCounterMode(display=False, depth=None) as counter:
        found = model(tokens[:, 69:], past_key_values=step.past_key_values)
    assert (found.depths == 1).all()
    layer = model.model.layers[1]
    size = layer.mixer.k_proj.weight.numel() + layer.mixer.v_proj.weight.numel()
    counted = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    of_layers = [next(n for name, n in counted.items() if name.endswith(f"model.layers.{i}")) for i in range(4)]
    assert of_layers[1:] == [2 * 2 * size] * 3 and of_layers[0] > 7 * of_layers[1]
    with FlopCounterMode(display=False) as counter:  # and not even these, where nothing is kept for later
        model(tokens, use_cache=False)
    assert not [name for name in counter.get_flop_counts() if "layers.1" in name]


def test_losses_of_the_exits(tokens):
    model = leaving(early_exit_threshold=0.0).train()
    labels = tokens.clone()
    labels[1, 50:] = -100
    found, outputs = model(tokens, labels=labels), model(tokens, output_hidden_states=True)
    named, of = labels[:, 1:] != -100, dict(model.named_parameters())
    final, losses, late = outputs.logits, [], 0.0
    for i, x in enumerate([*outputs.hidden_states[1:-1], None]):
        logits = final if x is None else model.lm_head(model.model.norm(x))
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
        if x is not None:
            same = (logits.argmax(-1) == final.argmax(-1)).double()
            said = model.model.layers[i].view.gate(x.detach()).squeeze(-1)
            each = F.binary_cross_entropy_with_logits(said, same, reduction="none")
            late = late + each[:, :-1][named].sum() / named.sum()
    expected = sum((i + 1) * loss for i, loss in enumerate(losses)) / 10 + late
    close = {"atol": 1e-5, "rtol": 1e-5, "check_dtype": False}  # transformers' loss is in float32
    assert_close(found.loss, expected, **close)
    assert_close(found.exit_loss, late.detach(), **close)
    gradients = [torch.autograd.grad(loss, of.values()) for loss in (found.loss, expected)]
    for name, ours, theirs in zip(of, *gradients, strict=True):
        assert_close(ours, theirs, **close, msg=name)


@torch.no_grad()
def test_low_precision_is_close_where_the_same_tokens_leave(tokens):
    model = Case(ROW, "ForCausalLM", fields=FIELDS).build(
        torch.float32, initializer_range=0.08, early_exit_threshold=0.5
    )
    with held_choices():
        expected = model(tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(tokens)
        low = model.bfloat16()(tokens)
    assert len({*expected.depths.flatten().tolist()}) > 1
    for found in (mixed, low):
        assert found.depths.equal(expected.depths)
        assert (found.logits - expected.logits).std() < 0.05 * expected.logits.std()


def test_compiled_training_equals_eager(tokens):
    kinds = ["routed_attention", "early_exit_attention", "early_exit_attention"]
    model = leaving(layer_types=kinds, num_hidden_layers=3).train()
    inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    model(**inputs).loss.backward()
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    torch._dynamo.reset()
    torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs).loss.backward()
    for name, weight in model.named_parameters():
        assert_close(weight.grad, expected[name], **EXACT, msg=name)


@pytest.mark.parametrize("kind", ["early_exit_attention", "routed_attention"])
def test_pieces_of_a_batch_add_up(kind, tokens):
    model, labels = leaving(layer_types=[kind] * 4).train(), tokens.clone()
    labels[1, 50:] = -100
    model(tokens, labels=labels).loss.backward()
    whole = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for row in range(2):
        told = {"labels": labels[row, None], "num_items_in_batch": torch.tensor(69 + 49)}
        model(tokens[row, None], **told).loss.backward()
    for name, weight in model.named_parameters():
        assert_close(weight.grad, whole[name], atol=1e-6, rtol=1e-5, msg=name)


def test_a_classifier_is_there_only_where_it_decides(tokens):
    assert not [name for name in leaving(**SATURATION).state_dict() if "gate." in name]
    model = leaving()
    assert [i for i, layer in enumerate(model.model.layers) if hasattr(layer.view, "gate")] == [0, 1, 2]
    model.train()(tokens).logits.sum().backward()  # without labels, too, each parameter has a gradient
    assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"early_exit_threshold": 2.0}, "early_exit_threshold is 2.0"),
        ({"layer_types": ["early_exit_attention", "full_attention"]}, "must be of that type"),
        ({"exit_confidence": "guess"}, "exit_confidence"),
    ],
    ids=str,
)
def test_contradictory_configs_are_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        ROW.tiny_config(**fields)


@torch.no_grad()
def test_layers_before_the_first_exit_may_be_of_any_kind(tokens):
    kinds = ["full_attention", "routed_attention", "early_exit_attention", "early_exit_attention"]
    model = leaving(layer_types=kinds, early_exit_threshold=0.5)
    found = model(tokens)
    assert {*found.depths.flatten().tolist()} == {1, 2}
    assert torch.equal(model.generate(tokens, max_new_tokens=3)[:, :70], tokens)
