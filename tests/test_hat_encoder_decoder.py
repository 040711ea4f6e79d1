"""The HAT encoder-decoder against its definition written slowly, and what it promises of documents in segments."""

import doctest
import math

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from slow_hat import linear, norm, slow_hat
from torch.testing import assert_close
from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_arch import find
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


def test_choices_are_made_in_one_place(model, tokens, monkeypatch):
    """Whoever compares precisions holds them."""
    asked = []
    choose = HierarchicalCrossAttention.choose
    monkeypatch.setattr(
        HierarchicalCrossAttention, "choose", lambda *told: asked.append(told[1].shape) or choose(*told)
    )
    model(tokens, labels=tokens[:, :30])
    assert asked == [(2, 4, 30, 9)] * 2


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_experts_in_one_stack_alone(stack):
    fields = {"feed_forward_types": ["dense"] * 2, "encoder_feed_forward_types": ["dense"] * 2}
    fields["feed_forward_types" if stack == "decoder" else "encoder_feed_forward_types"] = ["sparse", "dense"]
    model, tokens = CASE.build(num_local_experts=4, mlp_bias=False, **fields).train(), some_tokens()
    model(tokens, labels=tokens[:, :9]).loss.backward()
    gates = {name for name, weight in model.named_parameters() if "router" in name and weight.grad.any()}
    assert gates and all(f".{stack}." in name for name in gates)
