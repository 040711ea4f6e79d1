"""The Sparse Transformer against transformers' GPT-Neo and against dense layers, and attention sinks without end."""

import json

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from originals import scaled_up
from torch.testing import assert_close

from hf_arch import find
from hf_arch.bench.costs import Span
from hf_arch.bench.costs_of_long_context import pattern_pairs
from hf_arch.convert import convert
from promises import EXACT, Case, some_tokens

ROW = find("sparse_transformer")
NEO = {"vocab_size": 61, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 64}
NEO |= {"attention_types": [[["global", "local"], 2]], "window_size": 9, "bos_token_id": 1, "eos_token_id": 2}
PATTERNS = ("strided_attention", "fixed_attention", "dilated_attention")


def build(*kinds: str, head: str = "ForCausalLM", **fields):
    kinds = {"layer_types": list(kinds), "num_hidden_layers": len(kinds)} if kinds else {}
    return Case(ROW, head).build(**kinds, **fields)


def original(head: str, folder, **fields):
    config = transformers.GPTNeoConfig(**NEO | {"pad_token_id": 0, "num_labels": 2} | fields)
    made = scaled_up(getattr(transformers, f"GPTNeo{head}")(config))
    made.save_pretrained(folder)
    return made.double()


@torch.no_grad()
@pytest.mark.parametrize("head", ROW.heads)
def test_it_is_gpt_neo(head, tmp_path, narrows_nowhere):
    peer = original(head, tmp_path)
    ours, tokens = convert(tmp_path, "sparse_transformer").double(), some_tokens(length=50) % 61
    mask = torch.ones_like(tokens)
    mask[1, 41:] = 0
    tokens = tokens.where(mask > 0, 0)
    assert type(ours).__name__ == f"ArchSparseTransformer{head}"
    assert ours.config.layer_types == ["full_attention", "sliding_attention"] * 2 and ours.config.sliding_window == 9
    found, expected = ours(tokens, attention_mask=mask), peer(tokens, attention_mask=mask)
    for name in ("last_hidden_state", "logits", "start_logits", "end_logits"):
        if name in expected:
            real = mask.bool() if expected[name].shape[:2] == mask.shape else slice(None)
            assert_close(found[name][real], expected[name][real], **EXACT)
            assert expected[name].std() > 0.01


def test_a_gpt_neo_that_ours_cannot_be(tmp_path):
    original("ForCausalLM", tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"embed_dropout": 0.5}))
    with pytest.raises(ValueError, match="embed_dropout"):
        convert(tmp_path, "sparse_transformer")


@torch.no_grad()
def test_patterns_that_show_all_are_a_dense_transformer():
    fields = {"sliding_window": 70, "stride": 70, "dilated_segments": [70], "dilations": [1], "position_type": "rope"}
    dense, tokens = build("full_attention", "full_attention", **fields), some_tokens()
    for kind in ("sliding_attention", "sink_attention", "retrieval_attention", *PATTERNS):
        fields |= {"sliding_window": 6, "retrieval_block_size": 6} if kind == "retrieval_attention" else {}
        model = build(kind, kind, **fields, retrieved_blocks=12)
        model.load_state_dict(dense.state_dict())
        assert_close(model(tokens).logits, dense(tokens).logits, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", [*PATTERNS, "sink_attention"])
def test_what_a_layer_sees(kind, attention):
    """One layer: exactly the tokens of the pattern's definition change an answer."""
    model, tokens = build(kind, position_type="none"), some_tokens(1)
    model.set_attn_implementation(attention)
    place = torch.arange(70)[None]
    if kind == "sink_attention":
        distance = place[0][:, None] - place[0]
        seen = (distance >= 0) & ((distance < 9) | (place < 4))
    else:
        seen = model.model.layers[0].mixer.shown(model.config, place, place)[0].any(0)
    for column in (1, 20, 31, 55):
        changed = tokens.clone()
        changed[0, column] = (changed[0, column] + 1) % 90 + 3
        influence = (model(tokens).logits - model(changed).logits)[0].abs().amax(-1) > 1e-9
        assert torch.equal(influence, seen[:, column])


@torch.no_grad()
@pytest.mark.parametrize("kind", PATTERNS)
def test_recorded_weights_and_steps_are_those_of_the_definition(kind):
    model, tokens = build(kind, kind, position_type="rope"), some_tokens()
    whole = model(tokens).logits
    model.set_attn_implementation("eager")
    outputs = model(tokens, output_attentions=True)
    assert_close(outputs.logits, whole, atol=1e-5, rtol=1e-5)  # transformers' eager softmax is in float32
    place = torch.arange(70)[None]
    shown = model.model.layers[0].mixer.shown(model.config, place, place) > 0
    for weights in outputs.attentions:
        assert torch.equal(weights > 0, shown.expand_as(weights))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["strided_attention", "dilated_attention"])
def test_a_step_reads_only_what_the_pattern_shows(kind):
    model = build(kind, dilated_segments=[16, 128], dilations=[1, 8])
    cache = model(some_tokens(1, 200), use_cache=True).past_key_values
    mask = model.model.make_masks(torch.zeros(1, 1, 32), None, cache, None)[kind]
    assert len(mask.columns) < 60 and (mask.mask > -torch.inf).any(2).any(1).all()


@pytest.mark.parametrize("kind", PATTERNS)
def test_the_benchmark_counts_the_pairs_of_the_definition(kind):
    model, place = build(kind, dilated_segments=[16, 48], dilations=[1, 4]), torch.arange(70)[None]
    mixer = model.model.layers[0].mixer
    shown = mixer.shown(mixer.config, place[:, 30:], place)
    assert pattern_pairs(mixer, Span(40, before=30)) == pytest.approx(shown.sum().item() / shown.shape[1], rel=0.05)


def as_in_the_cache(model, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the last token of a one-layer model, by the words of the paper: attention to sinks and window, all
    numbered by where they stand in the cache."""
    config, layer = model.config, model.model.layers[0]
    hidden = layer.residual.norm["mixer"](model.model.embed_tokens(tokens))
    keep = config.num_sink_tokens + config.sliding_window
    if tokens.shape[1] > keep:
        hidden = torch.cat((hidden[:, : config.num_sink_tokens], hidden[:, -config.sliding_window :]), dim=1)
    stream, rotation = model.model.embed_positions(hidden, torch.arange(hidden.shape[1])[None])
    mixer = layer.mixer
    query, key, value = (p(stream).unflatten(-1, (-1, 8)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    turned = [torch.addcmul(x * rotation.cos, x.roll(4, dims=-1), rotation.sin).transpose(1, 2) for x in (query, key)]
    scores = turned[0][:, :, -1:] @ turned[1].transpose(2, 3) * 8**-0.5
    answer = (scores.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2).flatten(2)
    stream = model.model.embed_tokens(tokens)[:, -1:] + mixer.o_proj(answer)
    stream = stream + layer.feed_forward(layer.residual.norm["feed_forward"](stream))
    return model.lm_head(model.model.norm(stream))


@torch.no_grad()
def test_sinks_are_seen_from_where_they_stand_in_the_cache():
    model, tokens = build("sink_attention", position_type="rope"), some_tokens()
    logits = model(tokens).logits
    for length in (1, 4, 9, 12, 13, 14, 40, 70):
        assert_close(logits[:, length - 1 : length], as_in_the_cache(model, tokens[:, :length]), **EXACT)


@torch.no_grad()
def test_a_text_without_end_takes_constant_memory_and_stays_as_probable():
    """A model that has learnt nothing but to name its last token again does so 40 windows later as at first."""
    model = build("sink_attention", "sink_attention", position_type="rope", max_position_embeddings=32).float()
    tokens = some_tokens(1, 100).repeat(1, 6)
    cache, sizes, whole = None, [], model(tokens).logits
    for start in range(0, 600, 100):
        outputs = model(tokens[:, start : start + 100], past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        sizes.append(sum(state.numel() for layer in cache.layers for state in layer.states.values()))
        assert_close(outputs.logits, whole[:, start : start + 100], atol=1e-3, rtol=1e-3)
    assert sizes == [2 * (2 * 32 * (4 + 8) + 1)] * 6
    # once the window is full, an answer rests on the sinks and what two windows hold, not on where in the text it is
    assert_close(whole[:, 250:300], whole[:, 550:600], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_a_memory_of_all_tokens_grows_now_and_then_and_is_kept_by_place():
    fields = {"position_type": "rope", "retrieval_block_size": 4, "retrieved_blocks": 2}
    model, tokens = build("retrieval_attention", "retrieval_attention", **fields), some_tokens(2, 64)
    padded, mask = torch.cat((tokens[:, :5], tokens), dim=1), torch.ones(2, 69, dtype=torch.long)
    mask[0, 20:25] = mask[1, :5] = 0  # in the middle of one row, before the other
    padded[0] = torch.cat((tokens[0, :20], tokens[0, :5], tokens[0, 20:]))
    cache = model(padded[:, :40], attention_mask=mask[:, :40], use_cache=True).past_key_values
    stores, logits = [], []
    for n in range(40, 69):
        step = model(padded[:, n : n + 1], attention_mask=mask[:, : n + 1], past_key_values=cache)
        stores.append(cache.layers[0].states["text_history_key"])
        logits.append(step.logits)
    assert all(store is stores[0] for store in stores)
    assert_close(torch.cat(logits, dim=1), model(tokens).logits[:, 35:], **EXACT)
    assert cache.layers[0].states["text_history_count"].tolist() == [64, 64]
    plain = model(tokens, use_cache=True).past_key_values.layers[0].states
    held = cache.layers[0].states["text_history_key"]
    assert_close(held[:, :, :64], plain["text_history_key"][:, :, :64], **EXACT)


@torch.no_grad()
def test_weights_of_retrieved_blocks_are_recorded():
    fields = {"position_type": "rope", "retrieval_block_size": 4, "retrieved_blocks": 2}
    model, tokens = build("retrieval_attention", "retrieval_attention", **fields), some_tokens()
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    outputs = model(tokens, attention_mask=mask, output_attentions=True)
    assert_close(outputs.logits[mask > 0], model(tokens, attention_mask=mask).logits[mask > 0], **EXACT)
    for weights in outputs.attentions:
        assert_close(weights.sum(-1), torch.ones(2, 4, 70, dtype=torch.float64), **EXACT)
        assert ((weights[0] > 0).sum(-1) <= 9 + 4 + 2 * 4).all() and not weights[1, :, 9:, :9].any()


def test_what_cannot_be():
    for fields, said in (
        ({"stride": 4, "summary_columns": 5}, "summary_columns 5 is not between 1 and stride 4"),
        ({"num_sink_tokens": -1}, "it must not be negative"),
        ({"layer_types": ["sink_attention"] * 2, "sliding_window": 1}, "need a sliding_window of at least 2"),
        ({"layer_types": ["retrieval_attention"] * 2}, "retrieval_block_size, 64, between 1 and sliding_window, 9"),
        (
            {"layer_types": ["retrieval_attention"] * 2, "retrieval_block_size": 4, "retrieved_blocks": 0},
            "retrieved_blocks, 0, above 0",
        ),
        ({"sliding_window": None}, "need a positive sliding_window"),
        ({"dilated_segments": [8], "dilations": [1, 2]}, "dilated_segments has 1 entries and dilations 2"),
        ({"dilated_segments": [8, 15], "dilations": [1, 2]}, "15 tokens cannot be taken every 2"),
        ({"dilated_segments": [8], "dilations": [2]}, "one of them must be 1"),
        ({"attention_scaling": 0.0}, "must be positive"),
        ({"position_type": "rope", "head_dim": 7}, "must be even"),
    ):
        with pytest.raises(StrictDataclassError, match=said):
            ROW.tiny_config(**fields)
    plan = ROW.tiny_config(layer_types=["dilated_attention"] * 2).base_model_tp_plan
    assert not any("mixer" in name for name in plan)  # a head's tokens go by its number among all
