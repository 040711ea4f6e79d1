"""Levels of HAT: what each answers, what reaches tokens from above, shared parameters, and HAN."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from slow_hat import gru, linear, pooling
from test_hat import ROW, SHAPES, build, weights_of
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from hf_arch import lora_config
from hf_arch.bench.costs import Span, cost
from promises import EXACT, some_tokens


@torch.no_grad()
def test_every_level_has_its_representations():
    model, tokens = build(**SHAPES["three_levels"]), some_tokens()
    starts = torch.zeros_like(tokens)
    starts[:, ::3], starts[0, 33] = 1, 2  # 24 sentences; a paragraph after 11 of them, and after every four
    found = model(tokens, segment_starts=starts)
    sentences, paragraphs = found.level_embeddings.unbind(1)
    assert torch.equal(sentences, found.last_hidden_state[:, ::3]) and found.level_masks[:, 0].all()
    assert torch.equal(paragraphs[0, :7], found.last_hidden_state[0, [0, 12, 24, 33, 45, 57, 69]])
    assert found.level_masks[:, 1].sum(-1).tolist() == [7, 6] and not paragraphs[1, 6:].any()


@torch.no_grad()
def test_a_token_hears_from_above_in_the_layer_that_asks():
    """Without it a word that is not a leader hears nothing of other segments before level 0 runs again."""
    tokens = some_tokens(1)
    changed = tokens.clone()
    changed[0, 20] = 3 + changed[0, 20] % 90
    for layers, reached in ((["level_0", "level_1", "down_1"], True), (["level_0", "level_1", "level_1"], False)):
        model = build(layer_types=layers)
        assert ((model(changed)[0] - model(tokens)[0]).abs().amax(-1)[0, 40] > 1e-4) == reached


def test_levels_that_share_their_parameters():
    fields = SHAPES["top_down"]
    shared, own = build(**fields), build(**fields | {"shared_levels": False})
    assert shared.config.layer_groups == [0, 0, 1, 0, 2, 2, 3] and own.config.layer_groups == list(range(7))
    layer = sum(x.numel() for x in own.layers[0].parameters())
    saved = [sum(x.numel() for x in model.parameters()) for model in (own, shared)]
    assert saved[0] - saved[1] == 3 * layer
    with pytest.raises(StrictDataclassError, match="share parameters have feed-forwards none and dense"):
        ROW.tiny_config(**fields, feed_forward_types=["none"] + ["dense"] * 6)


@torch.no_grad()
def test_han_is_its_paper():
    """Yang et al., 2016, equations 1 to 11: words, sentences, and the classes of the document."""
    config = ROW.load("Config").han(hidden_size=12, vocab_size=96, num_labels=3, initializer_range=0.5, pad_token_id=0)
    assert config.layer_types == ["gru_0", "pool_0", "gru_1", "pool_1"] and config.layer_groups == [0, 1, 2, 3]
    torch.manual_seed(0)
    model = ROW.load("ForSequenceClassification")(config).double().eval()
    weights, tokens = weights_of(model), some_tokens(1, 40)
    starts = [0, 7, 8, 25]
    marks = torch.zeros_like(tokens)
    marks[0, starts] = 1
    words = [weights["model.embed_tokens.weight"][part] for part in tokens[0].tensor_split(starts[1:])]
    layers = [f"model.layers.{number}." for number in range(4)]
    sentences = torch.stack([pooling(weights, layers[1], gru(weights, layers[0], x)) for x in words])
    document = pooling(weights, layers[3], gru(weights, layers[2], sentences))
    expected = linear(weights, "score", document)
    assert_close(model(tokens, segment_starts=marks).logits[0], expected, **EXACT)


@pytest.mark.parametrize("shape", ["top_down", "han"])
def test_adapters_reach_layers_of_every_kind(shape, tmp_path):
    model, tokens = build("ForMaskedLM", **SHAPES[shape]), some_tokens()
    torch.manual_seed(1)
    model = get_peft_model(model, lora_config(model, r=2)).double()
    adapters = {name: x for name, x in model.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.normal_(std=0.3)
    found = model(input_ids=tokens, labels=tokens)
    found.loss.backward()
    assert all(adapter.grad.any() for adapter in adapters.values())
    reached = {name.split(".lora_")[0] for name in adapters}
    inside = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    assert reached == set(inside)
    for layer in model.base_model.model.model.layers:  # all that projects, but the weights of a recurrence's state
        found_in = [name for name, module in layer.named_modules() if isinstance(module, BaseTunerLayer)]
        plain = [x for x in layer.modules() if isinstance(x, torch.nn.Linear)]
        assert len(found_in) * 3 == len(plain)  # the base, and its two factors
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("ForMaskedLM", **SHAPES[shape]), tmp_path).double()
    assert_close(again(input_ids=tokens).logits, found.logits, **EXACT)
    assert_close(again.merge_and_unload()(tokens).logits, found.logits, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_its_cost_is_what_is_computed(shape):
    model = build(**SHAPES[shape]).float()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(some_tokens(1, 80))
    assert counter.get_total_flops() == pytest.approx(cost(model, Span(80)).operations, rel=0.03)


def test_other_forms_of_han():
    make = ROW.load("Config").han
    deep = make(num_levels=3, segment_lengths=[30, 20])
    assert deep.layer_types == ["gru_0", "pool_0", "gru_1", "pool_1", "gru_2", "pool_2"]
    attends = make(reads="level", hidden_size=24)
    assert attends.layer_types == ["level_0", "pool_0", "level_1", "pool_1"]
    assert attends.feed_forward_types == ["dense", "none"] * 2 and attends.residual_type == "post_norm"
    model = ROW.load("Model")(make(reads="level", hidden_size=24, vocab_size=96, intermediate_size=8)).eval()
    assert_close(model(some_tokens()).pooler_output, model(some_tokens())[0][:, 0])
