"""Converted checkpoints answer as their originals do, in float64, at weights where attention is far from uniform."""

import dataclasses
import json

import pytest
import torch
from originals import PEERS, original, rewrite
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from hf_arch import find
from hf_arch.convert import convert
from hf_arch.modeling.dense.transformer import conversion_transformer


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Llama narrows to float32 in its norm and rotations, in a float64 model too. Here it does not."""

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    @dynamic_rope_update
    def turns(self, x, position_ids):
        angle = position_ids[..., None] * self.inv_freq.to(x.dtype)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", torch.no_grad()(turns))


def inputs(side, length=40):
    """Two rows, one of them padded, with the positions of its real tokens."""
    ids = torch.randint(1, 61, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, slice(0, 7) if side == "left" else slice(-7, None)] = 0
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }


def largest_difference(ours, theirs, told):
    with torch.no_grad():
        ours, theirs = ours(**told)[0], theirs(**told)[0]
    assert ours.dtype == theirs.dtype == torch.float64
    difference = (ours - theirs).abs()
    if ours.ndim == 3:
        difference = difference[told["attention_mask"].bool()]
    return difference.max()


@pytest.mark.parametrize("name", PEERS)
def test_equals_the_original(name, tmp_path):
    theirs = original(name)
    theirs.save_pretrained(tmp_path)
    ours = convert(tmp_path, "transformer").double()
    theirs.double()
    first_token = "bert sequence" in name  # BERT pools column 0, which must be a token
    for side in ("right",) if first_token else ("right", "left"):
        assert largest_difference(ours, theirs, inputs(side)) < 1e-8, side


@pytest.mark.parametrize("name", ["llama tied, with wide heads", "gpt2", "bert pretraining"])
@pytest.mark.parametrize("style", ["sharded", "bin"])
def test_layouts_of_the_hub(name, style, tmp_path):
    theirs = original(name)
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, style, theirs.config.model_type)
    assert largest_difference(convert(tmp_path, "transformer").double(), theirs.double(), inputs("right")) < 1e-8


def test_segments_of_bert(tmp_path):
    theirs = original("bert")
    theirs.save_pretrained(tmp_path)
    told = inputs("right") | {"token_type_ids": (torch.arange(40) > 20).long().expand(2, -1)}
    assert largest_difference(convert(tmp_path, "transformer").double(), theirs.double(), told) < 1e-8


def test_rope_in_the_old_style_of_config_json(tmp_path):
    theirs = original("llama 3.1")
    theirs.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    rope = fields.pop("rope_parameters")
    fields |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours = convert(tmp_path, "transformer")
    assert ours.config.rope_parameters == theirs.config.rope_parameters
    assert largest_difference(ours.double(), theirs.double(), inputs("right")) < 1e-8


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_attention_is_far_from_uniform_here(name, tmp_path):
    original(name).save_pretrained(tmp_path)
    ours = convert(tmp_path, "transformer")
    ours.set_attn_implementation("eager")
    told = {"input_ids": inputs("right")["input_ids"][:1]}
    for weights in ours(**told, output_attentions=True).attentions:
        assert weights[:, :, 20:].amax(-1).mean() > 0.15  # uniform: at most 1 / 20


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_gradients_equal_the_original(name, tmp_path):
    theirs = original(name)
    theirs.save_pretrained(tmp_path)
    ours = convert(tmp_path, "transformer").double()
    theirs.double()
    told = inputs("right")
    labels = told["input_ids"].masked_fill(told["attention_mask"] == 0, -100)
    for model in (ours, theirs):
        logits = model(**told).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    conversion = {c.model_type: c for c in conversion_transformer.CONVERSIONS}[theirs.config.model_type]
    gradients = {key: x.grad for key, x in theirs.named_parameters()}
    expected = conversion.translate(gradients, theirs.config.to_dict(), ours)
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert base"])
def test_hidden_states_equal_the_original(name, tmp_path):
    theirs = original(name)
    theirs.save_pretrained(tmp_path)
    ours = convert(tmp_path, "transformer").double()
    told = {"input_ids": inputs("right")["input_ids"][:1], "output_hidden_states": True}
    ours, theirs = ours(**told).hidden_states, theirs.double()(**told).hidden_states
    assert len(ours) == len(theirs)
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-8, atol=1e-8)


def test_decoding_equals_the_original(tmp_path):
    theirs = original("llama")
    theirs.save_pretrained(tmp_path)
    told = {key: x for key, x in inputs("left", 12).items() if key != "position_ids"}
    told |= {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(convert(tmp_path, "transformer").generate(**told), theirs.generate(**told))


def test_what_is_saved_loads_as_it_was(tmp_path):
    source, output = tmp_path / "source", tmp_path / "output"
    original("gpt2").save_pretrained(source)
    GenerationConfig(max_new_tokens=7, eos_token_id=2, pad_token_id=0).save_pretrained(source)
    words = Tokenizer(models.BPE({"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.save(str(source / "tokenizer.json"))  # as for gpt2 on the Hub, no file says which class reads it

    ours = convert(source, "transformer", output=output)
    assert not ours.training
    loaded = AutoModelForCausalLM.from_pretrained(output)
    ids = torch.arange(20)[None]
    assert type(loaded) is type(ours)
    assert torch.equal(loaded(ids).logits, ours(ids).logits)
    assert loaded.generation_config.max_new_tokens == 7
    theirs, tokenizer = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(output)
    assert type(tokenizer) is type(theirs)
    assert tokenizer.eos_token == theirs.eos_token == "<|endoftext|>"
    assert tokenizer("abab").input_ids == theirs("abab").input_ids
    assert {path.name for path in tmp_path.iterdir()} == {"source", "output"}


def test_another_head_by_argument(tmp_path):
    original("gpt2").save_pretrained(tmp_path)
    backbone, ids = convert(tmp_path, "transformer", head="Model"), torch.arange(20)[None]
    assert isinstance(backbone, find("transformer").load("Model"))
    whole = convert(tmp_path, "transformer")
    assert torch.equal(backbone(ids).last_hidden_state, whole.model(ids).last_hidden_state)
    with pytest.raises(ValueError, match="2 parameters that the checkpoint does not have: score.bias, score.weight"):
        convert(tmp_path, "transformer", head="ForSequenceClassification")
    with pytest.raises(ValueError, match="it has Config, Model"):
        convert(tmp_path, "transformer", head="ForImages")


def test_labels_and_dtype_come_along(tmp_path):
    theirs = original("bert tokens", id2label={i: f"kind {i}" for i in range(5)}).bfloat16()
    theirs.save_pretrained(tmp_path)
    ours = convert(tmp_path, "transformer")
    assert ours.config.id2label == theirs.config.id2label
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["llama 3.1", "gpt2", "bert", "bert base"])
def test_verify_compares_with_the_original(name, tmp_path, capsys):
    original(name).save_pretrained(tmp_path)
    convert(tmp_path, "transformer", verify=True)
    said = capsys.readouterr().out
    assert said.startswith("Largest difference from the original: ")
    assert float(said.split()[-1]) < 1e-8


def test_verify_notices_a_wrong_conversion(tmp_path, monkeypatch):
    original("llama").save_pretrained(tmp_path)
    wrong = dataclasses.replace(
        conversion_transformer.LLAMA,
        config=lambda fields: conversion_transformer.llama_config(fields) | {"norm_eps": 0.1},
    )
    monkeypatch.setattr(conversion_transformer, "CONVERSIONS", (wrong,))
    with pytest.raises(ValueError, match="answers otherwise than the original"):
        convert(tmp_path, "transformer", output=tmp_path / "output", verify=True)
    assert not (tmp_path / "output").exists()
