"""What encoder-decoders promise beside the others: of the source, of both caches, and of the two stacks."""

import pytest
import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from torch.testing import assert_close
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    DataCollatorForSeq2Seq,
    DynamicCache,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from hf_arch import find
from hf_arch.modeling.dense.encoder_decoder import modeling_encoder_decoder as plain
from hf_arch.modeling.dense.encoder_decoder.configuration_encoder_decoder import ArchEncoderDecoderConfig
from hf_arch.modeling.layers.attention import Attention
from hf_arch.modeling.state_space.retnet.modeling_retnet import MultiScaleRetention
from promises import EXACT, Case, cache_layers_of, some_tokens

ROW = find("encoder_decoder")
CASE = Case(ROW, "ForConditionalGeneration", fields={"encoder_num_hidden_layers": 3})
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@strict
class RecurrentConfig(ArchEncoderDecoderConfig):
    layer_kinds = (*ArchEncoderDecoderConfig.layer_kinds, "retention")
    layer_kinds_of = ArchEncoderDecoderConfig.layer_kinds_of | {"causal": {"retention", "full_attention"}}
    value_expansion: float | int = 2.0


class RecurrentDecoder(plain.ArchEncoderDecoderDecoder):
    mixers = {"retention": MultiScaleRetention, "full_attention": Attention}


class RecurrentModel(plain.ArchEncoderDecoderModel):
    config: RecurrentConfig
    decoder_backbone = RecurrentDecoder


class RecurrentForConditionalGeneration(plain.ArchEncoderDecoderForConditionalGeneration):
    config: RecurrentConfig
    backbone = RecurrentModel


def recurrent(layer_types):
    fields = CASE.config().to_dict() | {"layer_types": layer_types, "position_type": "rope"}
    fields = {name: value for name, value in fields.items() if name not in ("mixer_types", "model_type")}
    torch.manual_seed(0)
    return RecurrentForConditionalGeneration(RecurrentConfig(**fields)).eval().double()


@pytest.fixture(params=["catalogue", "recurrent", "hybrid"])
def model(request):
    if request.param == "catalogue":
        return CASE.build()
    return recurrent(["retention", "retention" if request.param == "recurrent" else "full_attention"])


@pytest.fixture
def padded(tokens):
    mask = torch.ones_like(tokens)
    mask[1, 50:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_generates_the_argmax_of_its_own_forward(model, padded, options):
    generated = model.generate(**padded, **GREEDY, **options)
    logits = model(**padded, decoder_input_ids=generated).logits
    assert torch.equal(generated[:, 1:], logits[:, :-1].argmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("strategy", [{"num_beams": 3}, {"do_sample": True, "top_k": 20}], ids=str)
def test_strategies_do_not_depend_on_the_cache(model, padded, strategy):
    def run(**options):
        torch.manual_seed(3)
        return model.generate(**padded, **(GREEDY | strategy | options))

    expected = run(use_cache=False)
    assert torch.equal(run(), expected) and torch.equal(run(cache_implementation="static"), expected)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_mates_of_the_source_do_not_matter(model, tokens, side):
    answer = tokens[:, :12].flip(0)
    pieces = (tokens[:, :9], tokens) if side == "left" else (tokens, tokens[:, :9])
    mask = torch.ones(2, 79, dtype=torch.long)
    mask[:, slice(0, 9) if side == "left" else slice(70, None)] = 0
    expected = model(tokens, decoder_input_ids=answer).logits
    told = {"input_ids": torch.cat(pieces, dim=1), "attention_mask": mask}
    assert_close(model(**told, decoder_input_ids=answer).logits, expected, **EXACT)
    assert_close(model(tokens[1:], decoder_input_ids=answer[1:]).logits, expected[1:], **EXACT)
    assert torch.equal(model.generate(**told, **GREEDY), model.generate(tokens, **GREEDY))


@torch.no_grad()
def test_steps_equal_one_pass_and_keys_of_the_source_are_made_once(model, padded, tokens):
    answer, calls = tokens[:, 20:40], []
    expected = model(**padded, decoder_input_ids=answer, use_cache=False).logits
    for layer in model.model.decoder.layers:
        layer.cross_attention.k_proj.register_forward_hook(lambda *args: calls.append(1))
    encoded, cache, logits = model.model.encoder(**padded), None, []
    for piece in answer.split((5, 1, 14), dim=1):
        told = {"encoder_outputs": encoded, "past_key_values": cache, "use_cache": True}
        step = model(attention_mask=padded["attention_mask"], decoder_input_ids=piece, **told)
        cache = step.past_key_values
        logits.append(step.logits)
    assert_close(torch.cat(logits, dim=1), expected, **EXACT)
    assert len(calls) == 2 and cache.get_seq_length() == 20
    as_tuple = model(
        attention_mask=padded["attention_mask"], decoder_input_ids=answer, encoder_outputs=encoded.to_tuple()
    )
    assert_close(as_tuple.logits, expected, **EXACT)
    kinds = ["states" if kind == "retention" else "keys" for kind in model.config.layer_types]
    assert all(hasattr(layer, kind) for layer, kind in zip(cache_layers_of(cache), kinds, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 6])
def test_packed_pairs_do_not_meet(model, tokens, padding):
    sources, answers = (30, 3, 37), (7, 20, 5)
    answer = tokens[:, :32].flip(0)
    pairs = zip(tokens.split(sources, dim=1), answer.split(answers, dim=1), strict=True)
    expected = torch.cat([model(source, decoder_input_ids=target).logits for source, target in pairs], dim=1)
    told = {"input_ids": tokens, "decoder_input_ids": answer}
    for name, sizes in (("", sources), ("decoder_", answers)):
        positions = torch.cat([torch.arange(size) for size in (*sizes, padding)])[None].expand(2, -1)
        ids = told[f"{name}input_ids"]
        mask = torch.cat((torch.ones_like(ids), torch.zeros_like(ids[:, :padding])), dim=1)
        told |= {f"{name}position_ids": positions, f"{name}input_ids": torch.cat((ids, ids[:, :padding]), dim=1)}
        told |= {f"{name}attention_mask": mask} if padding else {}
    assert_close(model(**told).logits[:, :32], expected, **EXACT)
    told["decoder_position_ids"] = torch.arange(32 + padding)[None].expand(2, -1)
    with pytest.raises(ValueError, match="as many documents for the encoder as for the decoder"):
        model(**told)


def test_the_loss_is_of_the_token_at_its_own_place(model, tokens):
    labels = tokens[:, :20].clone()
    labels[0, 15:] = -100
    outputs = model(tokens, labels=labels)
    read = torch.cat((torch.zeros(2, 1, dtype=torch.long), labels[:, :-1]), dim=1)
    read[read == -100] = 0
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(labels), read)
    assert_close(outputs.logits, model(tokens, decoder_input_ids=read).logits, **EXACT)
    expected = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
    assert_close(outputs.loss, expected, atol=1e-5, rtol=1e-5, check_dtype=False)
    model.train()(tokens, labels=labels).loss.backward()
    assert not [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    with pytest.raises(ValueError, match="exactly one of decoder_input_ids"):
        model(tokens)


@torch.no_grad()
def test_weights_and_states_of_both_stacks_are_recorded(tokens):
    model = CASE.build(torch.float32)
    model.set_attn_implementation("eager")
    outputs = model(tokens, decoder_input_ids=tokens[:, :12], output_attentions=True, output_hidden_states=True)
    assert [weights.shape[-2:] for weights in outputs.cross_attentions] == [(12, 70)] * 2
    assert [weights.shape[-2:] for weights in outputs.decoder_attentions] == [(12, 12)] * 2
    assert [weights.shape[-2:] for weights in outputs.encoder_attentions] == [(70, 70)] * 3
    assert (len(outputs.encoder_hidden_states), len(outputs.decoder_hidden_states)) == (4, 3)
    for weights in (*outputs.cross_attentions, *outputs.decoder_attentions, *outputs.encoder_attentions):
        assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert not outputs.decoder_attentions[0].triu(1).any()


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_parts_load_from_the_whole_and_embeddings_are_shared(tied, tokens, tmp_path):
    model = CASE.build(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float64)
    stacks = loaded.model.encoder.embed_tokens.weight, loaded.model.decoder.embed_tokens.weight
    assert stacks[0] is stacks[1] and (loaded.lm_head.weight is stacks[0]) == tied
    encoder, report = AutoModelForTextEncoding.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not any(report.values())
    assert_close(encoder(tokens).last_hidden_state, model.model.encoder(tokens).last_hidden_state, **EXACT)
    kind = ROW.load("ForTokenClassification")
    _, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {"score.weight", "score.bias"} and not report["unexpected_keys"]
    loaded.resize_token_embeddings(100)
    assert loaded(tokens + 4, labels=tokens[:, :3] + 4).logits.shape == (2, 3, 100)
    assert loaded.model.encoder.embed_tokens.weight is loaded.model.decoder.embed_tokens.weight


def test_deep_norm_has_the_constants_of_two_stacks():
    fields = {"residual_type": "deep_norm", "encoder_num_hidden_layers": 6, "num_hidden_layers": 4}
    model = ROW.load("Model")(ROW.tiny_config(**fields))
    encoder, decoder = (stack.layers[0].residual for stack in (model.encoder, model.decoder))
    assert (encoder.alpha, encoder.beta) == (0.81 * (6**4 * 4) ** (1 / 16), 0.87 * (6**4 * 4) ** (-1 / 16))
    assert (decoder.alpha, decoder.beta) == (12**0.25, 48**-0.25)


def test_wrong_calls_and_configs_are_explained(tokens):
    model = CASE.build()
    for told, message in (
        ({"past_key_values": DynamicCache()}, "is of another model, since an encoder-decoder keeps two"),
        ({"decoder_input_ids": tokens, "decoder_inputs_embeds": torch.zeros(2, 3, 32)}, "exactly one of decoder_inp"),
        ({"decoder_input_ids": tokens[:1]}, "answered 2 rows, but the decoder is to go on with 1"),
        (
            {"encoder_outputs": (torch.zeros(2, 9, 32),), "attention_mask": tokens},
            r"the encoder's answer \[2, 9",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model(tokens, **told)
    with pytest.raises(ValueError, match="of one stack alone"):
        CASE.build(is_encoder_decoder=False)
    for fields, message in (
        ({"direction": "prefix"}, "The decoder is causal"),
        ({"encoder_num_hidden_layers": 0}, "encoder_num_hidden_layers is 0"),
        ({"encoder_layer_types": ["full_attention"] * 2}, "In the encoder: direction 'bidirectional'"),
        ({"encoder_feed_forward_types": ["gated"]}, "In the encoder: feed_forward_types has 1 entries for 2"),
        ({"decoder_start_token_id": 96}, "decoder_start_token_id 96 is not in the vocabulary"),
        ({"pad_token_id": None}, "pad_token_id is None"),
        ({"attention_scaling": 0.0}, "must be positive"),
    ):
        with pytest.raises(StrictDataclassError, match=message):
            ROW.tiny_config(**fields)


def test_a_trainer_generates_where_it_evaluates(tmp_path):
    """Copying three letters is learnt in no time, which only holds if training and generating agree."""
    rows = [{"input_ids": row.tolist(), "labels": [*row.tolist(), 2]} for row in 3 + some_tokens(64, 3).remainder(8)]
    torch.manual_seed(0)
    model = ROW.load("ForConditionalGeneration")(ROW.tiny_config(initializer_range=0.1, attention_scaling=None))
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path),
        max_steps=120,
        learning_rate=1e-2,
        per_device_train_batch_size=32,
        predict_with_generate=True,
        generation_max_length=6,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    pad = DataCollatorForSeq2Seq(Tokenizer(), model)
    trainer = Seq2SeqTrainer(model, arguments, pad, train_dataset=rows, eval_dataset=rows[:16])
    trainer.train()
    predictions = trainer.predict(rows[:16]).predictions[:, 1:5]
    right = sum(answer.tolist() == row["labels"] for answer, row in zip(predictions, rows[:16], strict=True))
    assert right >= 14


class Tokenizer:
    """Rows of one length need no padding."""

    padding_side = "right"

    def pad(self, features, **options):
        return {name: torch.tensor([row[name] for row in features]) for name in features[0]}
