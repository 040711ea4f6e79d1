"""Converted T5 checkpoints answer, generate and learn as the originals do, in float64, at weights far from small."""

import pytest
import torch
import transformers
from originals import scaled_up
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers.models.t5.modeling_t5 import T5LayerNorm

from hf_arch import convert, find
from promises import EXACT

SIZES = {"vocab_size": 61, "d_model": 32, "d_kv": 12, "d_ff": 40, "num_layers": 3, "num_decoder_layers": 2}
SIZES |= {"num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
SIZES |= {"decoder_start_token_id": 0}
GATED = SIZES | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
PEERS = {
    "t5": ("T5ForConditionalGeneration", SIZES),
    "t5 1.1": ("T5ForConditionalGeneration", GATED),
    "t5 base": ("T5Model", SIZES),
    "t5 encoder": ("T5EncoderModel", GATED),
    "t5 tokens": ("T5ForTokenClassification", SIZES | {"num_labels": 5}),
}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "decoder_start_token_id": 0}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """T5 narrows to float32 in its norm, in a float64 model too. Here it does not."""

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(T5LayerNorm, "forward", norm)


def pair(name, folder):
    """Ours, and the original."""
    kind, fields = PEERS[name]
    peer_class = getattr(transformers, kind)
    scaled_up(peer_class(transformers.T5Config(**fields))).save_pretrained(folder)
    if name == "t5 1.1":  # the head of its own that files on the Hub have; a new T5 of transformers 5 is tied always
        head = torch.randn(61, 32, generator=torch.Generator().manual_seed(2))
        add_tensors(folder, {"lm_head.weight": head})
    theirs = peer_class.from_pretrained(folder).eval().double()
    return convert(folder, "encoder_decoder").double(), theirs


def add_tensors(folder, tensors):
    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file, {"format": "pt"})


def inputs(model, side="right"):
    ids = torch.randint(2, 61, (2, 50), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, slice(0, 7) if side == "left" else slice(-7, None)] = 0
    told = {"input_ids": ids, "attention_mask": mask}
    if hasattr(model, "decoder") or hasattr(model, "lm_head"):
        told["decoder_input_ids"] = ids[:, 10:40].flip(0)
    return told


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PEERS)
def test_equals_the_original(name, side, tmp_path):
    ours, theirs = pair(name, tmp_path)
    told = inputs(theirs, side)
    found, expected = ours(**told)[0], theirs(**told)[0]
    assert expected.std() > 0.2
    if "decoder_input_ids" not in told:
        real = told["attention_mask"].bool()
        found, expected = found[real], expected[real]
    assert_close(found, expected, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("name", ["t5", "t5 1.1"])
def test_steps_and_generation_equal_the_original(name, tmp_path):
    ours, theirs = pair(name, tmp_path)
    told = inputs(theirs)
    answer, expected, cache = told.pop("decoder_input_ids"), [], None
    found = []
    for piece in answer.split((5, 1, 1, 23), dim=1):
        outputs = ours(**told, decoder_input_ids=piece, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        found.append(outputs.logits)
    expected = theirs(**told, decoder_input_ids=answer).logits
    assert_close(torch.cat(found, dim=1), expected, **EXACT)
    for options in ({}, {"num_beams": 3}, {"num_beams": 2, "length_penalty": 2.0, "eos_token_id": 7}):
        options = GREEDY | options
        assert torch.equal(ours.generate(**told, **options), theirs.generate(**told, **options))


@pytest.mark.parametrize("name", ["t5", "t5 1.1"])
def test_gradients_equal_the_original(name, tmp_path):
    ours, theirs = pair(name, tmp_path)
    told = inputs(theirs)
    labels = told.pop("decoder_input_ids").masked_fill(torch.arange(30) > 25, -100)
    for model in (ours, theirs):
        answer = model.prepare_decoder_input_ids_from_labels(labels)
        logits = model(**told, decoder_input_ids=answer).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    for mine, yours in (
        (ours.model.encoder.embed_tokens.weight, theirs.shared.weight),
        (
            ours.model.decoder.embed_positions.relative_attention_bias.weight,
            theirs.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight,
        ),
        (ours.model.encoder.layers[1].mixer.q_proj.weight, theirs.encoder.block[1].layer[0].SelfAttention.q.weight),
        (
            ours.model.decoder.layers[1].cross_attention.v_proj.weight,
            theirs.decoder.block[1].layer[1].EncDecAttention.v.weight,
        ),
        (
            ours.model.decoder.layers[0].feed_forward.up_proj.weight,
            getattr(theirs.decoder.block[0].layer[2].DenseReluDense, "wi" if name == "t5" else "wi_1").weight,
        ),
    ):
        assert yours.grad.any()
        assert_close(mine.grad, yours.grad, **EXACT)


@torch.no_grad()
def test_an_encoder_and_a_classifier_of_a_whole_checkpoint(tmp_path):
    _, theirs = pair("t5", tmp_path)
    old = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # as the first checkpoints have it
    add_tensors(tmp_path, {old: torch.zeros(8, 4)})
    told = inputs(None)
    encoder = convert(tmp_path, "encoder_decoder", head="EncoderModel").double()
    expected = theirs.encoder(**told).last_hidden_state
    real = told["attention_mask"].bool()
    assert_close(encoder(**told).last_hidden_state[real], expected[real], **EXACT)
    with pytest.raises(ValueError, match="does not have: score.bias, score.weight"):
        convert(tmp_path, "encoder_decoder", head="ForSequenceClassification")


def test_what_is_converted_is_verified_saved_and_loaded(tmp_path, capsys):
    pair("t5 1.1", tmp_path / "source")
    ours = convert(tmp_path / "source", "encoder_decoder", output=tmp_path / "output", verify=True)
    assert float(capsys.readouterr().out.split()[-1]) < 1e-8
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "output")
    assert isinstance(loaded, find("encoder_decoder").load("ForConditionalGeneration"))
    told = inputs(ours)
    assert torch.equal(loaded(**told).logits, ours(**told).logits)
    assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)
