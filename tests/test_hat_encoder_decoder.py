"""The HAT encoder-decoder against its definition written slowly, and what it promises of documents in segments."""

import doctest
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from slow_hat import linear, norm, slow_hat
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSeq2SeqLM, EncoderDecoderCache, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.generation import GenerationMixin

from hf_arch import find, fork
from hf_arch.modeling.layers.hierarchical_cross_attention import HierarchicalCrossAttention
from promises import EXACT, Case, some_tokens

ROW = find("hat_encoder_decoder")
CASE = Case(ROW, "ForConditionalGeneration")
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
THREE = {"segment_lengths": [5, 4], "encoder_num_hidden_layers": 4, "num_chosen_segments": 3}
THREE |= {"encoder_layer_types": ["level_0", "level_1", "level_2", "down_1"], "encoder_feed_forward_types": None}


def marks(tokens: torch.Tensor) -> torch.Tensor:
    """Sentences of all lengths."""
    starts = torch.zeros_like(tokens)
    starts[:, ::7] = starts[:, 3] = starts[:, 4] = 1
    return starts


@pytest.fixture
def model():
    return CASE.build()


@pytest.fixture
def source(tokens):
    """A padded batch with segments of the caller's."""
    mask = torch.ones_like(tokens)
    mask[1, 50:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "segment_starts": marks(tokens)}


def segments_by_hand(starts: list[int], longest: int) -> list[list[int]]:
    found = []
    for place, start in enumerate(starts):
        if not found or start or len(found[-1]) == longest:
            found.append([])
        found[-1].append(place)
    return found


def slow_cross(weights, name, x, encoded, segments, config):
    """Each token and head by itself: it chooses segments by their leaders, and sees their tokens."""
    dim, answer = config.hidden_size // config.num_attention_heads, torch.zeros_like(x)
    query, key, value, asking, leading = (
        linear(weights, f"{name}{part}_proj", of)
        for part, of in (("q", x), ("k", encoded), ("v", encoded), ("segment_q", x), ("segment_k", encoded))
    )
    for at in range(len(x)):
        for head in range(config.num_attention_heads):
            own = slice(head * dim, (head + 1) * dim)
            scores = [leading[segment[0], own] @ asking[at, own] / math.sqrt(dim) for segment in segments]
            best = sorted(range(len(segments)), key=lambda s: -scores[s])[: config.num_chosen_segments]
            seen = [(token, scores[s]) for s in best for token in segments[s]]
            logits = [key[token, own] @ query[at, own] / math.sqrt(dim) + of_segment for token, of_segment in seen]
            answer[at, own] = torch.stack(logits).softmax(0) @ value[[token for token, _ in seen], own]
    return linear(weights, f"{name}o_proj", answer)


def slow_decoder(weights, config, ids, encoded, segments):
    """The last hidden states of a decoder that knows no positions."""
    heads, length = config.num_attention_heads, len(ids)
    x = norm(weights, "embed_norm", weights["embed_tokens.weight"][ids], config.norm_eps)
    for layer in range(config.num_hidden_layers):
        name = f"layers.{layer}."
        normed = norm(weights, f"{name}residual.norm.mixer", x, config.norm_eps)
        q, k, v = (
            linear(weights, f"{name}mixer.{part}_proj", normed).view(length, heads, -1).transpose(0, 1)
            for part in "qkv"
        )
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(torch.ones(length, length).triu(1) > 0, -math.inf)
        x = x + linear(weights, f"{name}mixer.o_proj", (scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
        normed = norm(weights, f"{name}residual.norm.cross_attention", x, config.norm_eps)
        x = x + slow_cross(weights, f"{name}cross_attention.", normed, encoded, segments, config)
        normed = norm(weights, f"{name}residual.norm.feed_forward", x, config.norm_eps)
        inner = F.gelu(linear(weights, f"{name}feed_forward.up_proj", normed))
        x = x + linear(weights, f"{name}feed_forward.down_proj", inner)
    return norm(weights, "norm", x, config.norm_eps)


@torch.no_grad()
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("fields", [{}, THREE, {"num_chosen_segments": 40}], ids=["two", "three", "all"])
def test_it_is_its_definition(fields, given, tokens):
    model = CASE.build(position_type="none", **fields)
    weights = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    encoder, decoder = (
        {name.removeprefix(f"{part}."): tensor for name, tensor in weights.items() if name.startswith(part)}
        for part in ("encoder", "decoder")
    )
    answer, starts = tokens[:, :9].flip(0), marks(tokens) * given
    logits = model(tokens, decoder_input_ids=answer, segment_starts=starts if given else None).logits
    for found, ids, told, begins in zip(logits, tokens, answer, starts.tolist(), strict=True):
        encoded = slow_hat(encoder, model.model.encoder.config, ids, begins)
        segments = segments_by_hand(begins, model.config.segment_lengths[0])
        hidden = slow_decoder(decoder, model.config, told, encoded, segments)
        assert_close(found, hidden @ model.lm_head.weight.T, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_mates_of_the_source_do_not_matter(model, tokens, side):
    answer, starts = tokens[:, :12].flip(0), marks(tokens)
    mask = torch.ones(2, 79, dtype=torch.long)
    mask[:, slice(0, 9) if side == "left" else slice(70, None)] = 0
    pads = [(x[:, :9], x) if side == "left" else (x, x[:, :9]) for x in (tokens, starts)]
    ids, begins = (torch.cat(pieces, dim=1) for pieces in pads)
    expected = model(tokens, segment_starts=starts, decoder_input_ids=answer).logits
    told = {"input_ids": ids, "attention_mask": mask, "segment_starts": begins}
    assert_close(model(**told, decoder_input_ids=answer).logits, expected, **EXACT)
    alone = model(tokens[1:], segment_starts=starts[1:], decoder_input_ids=answer[1:]).logits
    assert_close(alone, expected[1:], **EXACT)
    generated = model.generate(tokens, segment_starts=starts, **GREEDY, num_beams=2)
    assert torch.equal(model.generate(**told, **GREEDY, num_beams=2), generated)


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 6])
def test_packed_pairs_do_not_meet(model, tokens, padding):
    sources, answers = (30, 3, 37), (7, 20, 5)
    answer, starts = tokens[:, :32].flip(0), marks(tokens)
    pieces = (tokens.split(sources, 1), starts.split(sources, 1), answer.split(answers, 1))
    alone = [
        model(ids, segment_starts=begins, decoder_input_ids=target, output_attentions=True)
        for ids, begins, target in zip(*pieces, strict=True)
    ]
    told = {"input_ids": tokens, "decoder_input_ids": answer}
    for name, sizes in (("", sources), ("decoder_", answers)):
        positions = torch.cat([torch.arange(size) for size in (*sizes, padding)])[None].expand(2, -1)
        ids = told[f"{name}input_ids"]
        mask = torch.cat((torch.ones_like(ids), torch.zeros_like(ids[:, :padding])), dim=1)
        told |= {f"{name}position_ids": positions, f"{name}input_ids": torch.cat((ids, ids[:, :padding]), dim=1)}
        told |= {f"{name}attention_mask": mask} if padding else {}
    told["segment_starts"] = torch.cat((starts, starts[:, :padding]), dim=1)
    found = model(**told, output_attentions=True)
    assert_close(found.logits[:, :32], torch.cat([each.logits for each in alone], dim=1), **EXACT)
    for layer, weights in enumerate(found.cross_attentions):
        expected = [torch.block_diag(*(each.cross_attentions[layer][row, 1] for each in alone)) for row in range(2)]
        assert_close(weights[:, 1, :32, :70], torch.stack(expected), **EXACT)
    del told["decoder_position_ids"]
    with pytest.raises(ValueError, match="as many documents for the encoder as for the decoder"):
        model(**told)
    with pytest.raises(ValueError, match="or a row to each document"):
        model.generate(tokens, position_ids=told["position_ids"][:, :70], **GREEDY)


@torch.no_grad()
def test_steps_equal_one_pass_and_keys_of_the_source_are_made_once(model, source, tokens):
    answer, calls = tokens[:, 20:60], []
    told = {name: source[name] for name in ("attention_mask", "segment_starts")}
    expected = model(**source, decoder_input_ids=answer, use_cache=False, output_attentions=True)
    for layer in model.model.decoder.layers:
        for part in (layer.cross_attention.k_proj, layer.cross_attention.segment_k_proj):
            part.register_forward_hook(lambda *args: calls.append(1))
    told["encoder_outputs"], cache, found = model.model.encoder(**source), None, []
    for piece in answer.split((5, 1, 3, 31), dim=1):
        told |= {"past_key_values": cache, "output_attentions": True}
        found.append(model(**told, decoder_input_ids=piece, use_cache=True))
        cache = found[-1].past_key_values
    assert_close(torch.cat([each.logits for each in found], dim=1), expected.logits, **EXACT)
    for layer, weights in enumerate(expected.cross_attentions):
        assert weights.shape == (2, 4, 40, 70) and not weights[1, ..., 50:].any()
        assert (weights > 0).sum(-1).max() <= 16  # two segments of eight
        assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), **EXACT)
        assert_close(torch.cat([each.cross_attentions[layer] for each in found], dim=2), weights, **EXACT)
    assert len(calls) == 4 and cache.get_seq_length() == 40
    told |= {"encoder_outputs": told["encoder_outputs"].to_tuple(), "past_key_values": None}
    assert_close(model(**told, decoder_input_ids=answer).logits, expected.logits, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_beams_share_the_source(model, source, options, monkeypatch):
    """As each with a copy of it, whose keys would be put in order at every step."""
    shared = model.generate(**source, **GREEDY, **options, return_dict_in_generate=True)
    cross = shared.past_key_values.cross_attention_cache
    assert [len(layer.states["key"]) for layer in cross.layers] == [2, 2]
    assert len(cross.layers[0].states["row"]) == 2 * options["num_beams"]
    assert torch.equal(model.generate(**source, **GREEDY, **options, use_cache=False), shared.sequences)
    monkeypatch.setattr(type(model), "_expand_inputs_for_generation", GenerationMixin._expand_inputs_for_generation)
    copied = model.generate(**source, **GREEDY, **options, return_dict_in_generate=True)
    assert torch.equal(copied.sequences, shared.sequences)


@torch.no_grad()
def test_rows_of_a_cache_in_any_order(model, source, tokens):
    """Rows that change places, or become several, ask the source that they asked."""
    answer = tokens[:, :5]
    cache = model(**source, decoder_input_ids=answer, use_cache=True).past_key_values
    encoded = model.model.encoder(**source)
    after = {"encoder_outputs": encoded, "decoder_input_ids": tokens[:, 5:6]}
    expected = model(**after, past_key_values=fork(cache)).logits
    cache = fork(cache, 2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 1]))
    cache.batch_select_indices(torch.tensor([0, 3, 1]))
    rows = torch.tensor([1, 0, 0])
    after["decoder_input_ids"] = after["decoder_input_ids"][rows]
    assert_close(model(**after, past_key_values=cache).logits, expected[rows], **EXACT)
    cache.reset()
    again = model(**source, decoder_input_ids=answer[:, :1], past_key_values=cache).logits
    assert_close(again, model(**source, decoder_input_ids=answer[:, :1]).logits, **EXACT)


@torch.no_grad()
def test_segments_of_the_callers_reach_generation(model, source):
    for name in ROW.heads:
        assert "segment_starts" in inspect.signature(ROW.load(name).forward).parameters
    generated = model.generate(**source, **GREEDY)
    logits = model(**source, decoder_input_ids=generated).logits
    assert torch.equal(generated[:, 1:], logits[:, :-1].argmax(-1))
    plain = {name: value for name, value in source.items() if name != "segment_starts"}
    assert (model(**plain, decoder_input_ids=generated).logits - logits).abs().max() > 0.1


@torch.no_grad()
def test_a_step_costs_by_segments():
    """Of a plain encoder-decoder a step is as much more as its source is longer; here a segment more is a product with
    its key, which is 2 x 2 x 32 numbers in two layers, and nothing else."""
    fields = {"max_position_embeddings": 4096, "segment_lengths": [64], "encoder_layer_types": None}
    steps = {}
    for name in ("hat_encoder_decoder", "encoder_decoder"):
        case = Case(find(name), CASE.head)
        model = case.build(torch.float32, **(fields if name == ROW.name else {}))
        model.set_attn_implementation("eager")
        for length in (1024, 4096):
            encoded = (torch.randn(1, length, 32),)
            told = {"encoder_outputs": encoded, "decoder_input_ids": some_tokens(1, 1)}
            told["past_key_values"] = model(**told, use_cache=True).past_key_values
            with FlopCounterMode(display=False) as counter:
                model(**told)
            steps[name, length] = counter.get_total_flops()
    assert steps["hat_encoder_decoder", 4096] - steps["hat_encoder_decoder", 1024] == 2 * 2 * 32 * 48
    assert steps["encoder_decoder", 4096] - steps["encoder_decoder", 1024] == 2 * 4 * 32 * 3072


def test_the_choice_is_learnt(tmp_path):
    """Half of one segment of four is a letter, to be named by who sees one segment, and the encoder tells no other of
    it: who chose at random would be right in three of eight new texts."""
    torch.manual_seed(0)
    letters, where = torch.randint(4, 10, (2688,)), torch.randint(0, 4, (2688,))
    ids, row = torch.randint(12, 60, (2688, 4, 8)), torch.arange(2688)
    ids[row, where] = torch.where(torch.rand(2688, 8).argsort(-1) < 4, letters[:, None], ids[row, where])
    rows = [{"input_ids": text, "labels": letter[None]} for text, letter in zip(ids.flatten(1), letters, strict=True)]
    fields = {"encoder_layer_types": ["level_1", "level_0"], "num_hidden_layers": 1, "num_chosen_segments": 1}
    model = CASE.build(torch.float32, initializer_range=0.1, **fields)
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path),
        max_steps=80,
        learning_rate=1e-2,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        predict_with_generate=True,
        generation_max_length=3,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=rows[:2560])
    trainer.train()
    predicted = torch.tensor(trainer.predict(rows[2560:]).predictions[:, 1])
    assert (predicted == letters[2560:]).float().mean() > 0.9


@torch.no_grad()
def test_groups_of_heads_share_keys_of_tokens_and_of_segments(model, source, tokens):
    grouped = CASE.build(num_key_value_heads=2)
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if "decoder.layers" in name and name.split(".")[-2] in ("k_proj", "v_proj", "segment_k_proj"):
            weights[name] = weight.unflatten(0, (2, -1)).repeat_interleave(2, dim=0).flatten(0, 1)
    model.load_state_dict(weights)
    expected = model(**source, decoder_input_ids=tokens[:, :30]).logits
    assert_close(grouped(**source, decoder_input_ids=tokens[:, :30]).logits, expected, **EXACT)
    assert torch.equal(grouped.generate(**source, **GREEDY), model.generate(**source, **GREEDY))


@torch.no_grad()
def test_tied_embeddings_load_and_are_resized(tokens, tmp_path):
    model = CASE.build(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float64)
    stacks = loaded.model.encoder.embed_tokens.weight, loaded.model.decoder.embed_tokens.weight
    assert stacks[0] is stacks[1] is loaded.lm_head.weight
    assert_close(loaded(tokens, labels=tokens).logits, model(tokens, labels=tokens).logits, **EXACT)
    hat = find("hat").load("Model")(model.model.encoder.config).double()
    hat.load_state_dict(model.model.encoder.state_dict())
    assert_close(hat(tokens).last_hidden_state, model.model.encoder(tokens).last_hidden_state, **EXACT)
    loaded.resize_token_embeddings(100)
    assert loaded(tokens + 4, labels=tokens[:, :3] + 4).logits.shape == (2, 3, 100)
    assert loaded.model.encoder.embed_tokens.weight is loaded.model.decoder.embed_tokens.weight


def test_wrong_calls_and_configs_are_explained(model, tokens):
    for told, message in (
        ({"decoder_input_ids": tokens[:1]}, "answered 2 rows, but the decoder is to go on with 1"),
        ({"labels": tokens, "segment_starts": tokens[:, :3]}, r"segment_starts are \[2, 3\]"),
        ({"labels": tokens, "attention_mask": torch.zeros_like(tokens)}, "Row 0 has no real token"),
    ):
        with pytest.raises(ValueError, match=message):
            model(tokens, **told)
    for fields, message in (
        ({"num_chosen_segments": 0}, "num_chosen_segments is 0"),
        ({"segment_lengths": [0]}, "In the encoder: segment_lengths has 0"),
        ({"encoder_layer_types": ["level_0"] * 2}, "In the encoder: No layer works at level_1"),
        ({"encoder_feed_forward_types": ["gated"] * 2}, "In the encoder: feed_forward_types has gated"),
        ({"encoder_num_hidden_layers": 0, "encoder_layer_types": None}, "num_hidden_layers is 0"),
    ):
        with pytest.raises(StrictDataclassError, match=message):
            ROW.tiny_config(**fields)


def test_the_example_runs():
    (example,) = doctest.DocTestFinder(recurse=False).find(ROW.load(CASE.head), "example", globs={})
    assert doctest.DocTestRunner().run(example).failed == 0


def test_caches_of_others_take_it_in(model, source, tokens):
    """A cache that a user made, as the error message of a wrong one says."""
    from transformers import DynamicCache

    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache())
    with torch.no_grad():
        found = model(**source, decoder_input_ids=tokens[:, :5], past_key_values=cache).logits
        assert_close(found, model(**source, decoder_input_ids=tokens[:, :5]).logits, **EXACT)


def test_choices_are_made_in_one_place(model, tokens, monkeypatch):
    """Whoever compares precisions holds them."""
    asked = []
    choose = HierarchicalCrossAttention.choose
    monkeypatch.setattr(
        HierarchicalCrossAttention, "choose", lambda *told: asked.append(told[1].shape) or choose(*told)
    )
    model(tokens, labels=tokens[:, :30])
    assert asked == [(2, 4, 30, 9)] * 2
