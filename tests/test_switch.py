"""The Switch Transformer against transformers' own, in float64 at weights where attention and routing are far from
uniform; and what it promises beside the others."""

import re

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from originals import scaled_up
from peft import get_peft_model
from safetensors.torch import load_file
from test_t5 import GREEDY, inputs
from torch.testing import assert_close
from transformers.models.switch_transformers import modeling_switch_transformers as peer

import hf_arch
from hf_arch.modeling.layers.sparse import SwitchFeedForward
from hf_arch.modeling.moe.switch import conversion_switch
from promises import EXACT, Case, some_tokens

ROW = hf_arch.find("switch")
LENGTH = 40
SIZES = {"vocab_size": 61, "d_model": 32, "d_kv": 12, "d_ff": 40, "num_layers": 4, "num_decoder_layers": 3}
SIZES |= {"num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
SIZES |= {"num_experts": 5, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 1, "dropout_rate": 0.0}
SIZES |= {"decoder_start_token_id": 0, "expert_capacity": 64}
CLASSES = ("ForConditionalGeneration", "Model", "EncoderModel")
TIGHT = {"expert_capacity": 6}  # of 40 tokens, for 5 experts
FULL = {"eval_capacity_factor": 6 * 5 / LENGTH}


@pytest.fixture(autouse=True)
def exact(narrows_nowhere):
    """transformers' Switch narrows to float32 in norms, and where `pair` does not tell it otherwise."""


def pair(folder, name="ForConditionalGeneration", eval_capacity_factor=None, **more):
    """Ours and theirs, with the same weights, in float64."""
    kind = getattr(transformers, f"SwitchTransformers{name}")
    theirs = scaled_up(kind(transformers.SwitchTransformersConfig(**SIZES | more)))
    theirs.set_input_embeddings(theirs.shared)  # transformers 5 gives each stack its own where the head is not tied
    theirs.save_pretrained(folder)
    ours = hf_arch.convert(folder, "switch", eval_capacity_factor=eval_capacity_factor).double()
    theirs.double()
    for module in theirs.modules():
        if isinstance(module, peer.SwitchTransformersTop1Router):
            module.dtype = torch.float64  # their config knows narrower ones alone
    return ours, theirs


def told(model, side=None):
    """A source and an answer of one length, the source of the second row padded."""
    given = inputs(model, side or "left")
    given = {name: ids[:, 10:50] for name, ids in given.items() if name != "decoder_input_ids"}
    if side is None:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    if hasattr(model, "decoder"):
        given["decoder_input_ids"] = given["input_ids"].flip(0)
    return given


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CLASSES)
def test_equals_the_original(name, side, tmp_path):
    ours, theirs = pair(tmp_path, name, tie_word_embeddings=side == "left")
    given = inputs(theirs, side)
    found, expected = ours(**given)[0], theirs(**given)[0]
    assert found.dtype == expected.dtype == torch.float64 and expected.std() > 0.2
    real = given["attention_mask"].bool() if name == "EncoderModel" else slice(None)
    assert_close(found[real], expected[real], **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSES)
def test_drops_the_tokens_that_the_original_drops(name, tmp_path):
    ours, theirs = pair(tmp_path, name, **TIGHT, **FULL)
    given = told(theirs)
    outputs = ours(**given, output_router_logits=True)
    assert_close(outputs[0], theirs(**given)[0], **EXACT)
    choices = outputs.get("encoder_router_choices") or outputs.get("router_choices")
    assert (torch.stack(choices) == 5).double().mean() > 0.1
    for module in ours.modules():
        if isinstance(module, SwitchFeedForward):
            module.capacity_factor[False] = None
    assert (ours(**given)[0] - outputs[0]).abs().max() > 0.1


@torch.no_grad()
def test_steps_and_generation_equal_the_original(tmp_path):
    ours, theirs = pair(tmp_path)
    given = inputs(theirs)
    answer, found, cache = given.pop("decoder_input_ids"), [], None
    for piece in answer.split((5, 1, 1, 23), dim=1):
        outputs = ours(**given, decoder_input_ids=piece, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        found.append(outputs.logits)
    assert_close(torch.cat(found, dim=1), theirs(**given, decoder_input_ids=answer).logits, **EXACT)
    for options in ({}, {"num_beams": 3}, {"num_beams": 2, "length_penalty": 2.0, "eos_token_id": 7}):
        assert torch.equal(ours.generate(**given, **GREEDY | options), theirs.generate(**given, **GREEDY | options))


@pytest.mark.parametrize("limits", [{}, TIGHT | FULL], ids=["room", "tight"])
def test_losses_and_gradients_equal_the_original(limits, tmp_path):
    """Of one row, since theirs balances each row by itself; and weighs the losses of both stacks alike, as ours."""
    ours, theirs = pair(tmp_path, router_aux_loss_coef=0.1, router_z_loss_coef=0.3, **limits)
    given = {name: ids[:1] for name, ids in told(theirs).items()}
    given["labels"] = given.pop("decoder_input_ids")
    mine, expected = (model(**given, output_router_logits=True) for model in (ours, theirs))
    assert_close(mine.aux_loss, expected.encoder_aux_loss + expected.decoder_aux_loss, **EXACT)
    assert_close(mine.loss, expected.loss, **EXACT)
    without = ours(**given).loss
    z_loss = (mine.loss - without - 0.1 * mine.aux_loss) / 0.3
    assert_close(z_loss, expected.encoder_z_loss + expected.decoder_z_loss, **EXACT)
    mine.loss.backward(), expected.loss.backward()
    gradients = {  # theirs has none for experts that no token takes
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in theirs.named_parameters()
    }
    gradients = conversion_switch.SWITCH.translate(gradients, theirs.config.to_dict(), ours)
    for name, weight in ours.named_parameters():
        assert_close(weight.grad, gradients[name], **EXACT, msg=name)


def test_layouts_of_checkpoints(tmp_path, capsys):
    ours, _ = pair(tmp_path / "source", expert_capacity=64, num_experts=8)
    names = load_file(tmp_path / "source" / "model.safetensors")
    assert "encoder.block.1.layer.1.mlp.router.classifier.weight" in names
    assert "decoder.block.1.layer.2.mlp.experts.expert_7.wi.weight" in names
    converted = hf_arch.convert(tmp_path / "source", "switch", output=tmp_path / "ours", verify=True)
    assert float(capsys.readouterr().out.split()[-1]) < 1e-5  # their routers are in float32
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours")
    assert_close(loaded.state_dict(), converted.state_dict(), atol=0, rtol=0)
    config = loaded.config
    assert config.encoder_feed_forward_types == ["dense", "switch"] * 2
    assert config.feed_forward_types == ["dense", "switch", "dense"]
    assert (config.expert_capacity_factor, config.eval_capacity_factor) == (1.0, None)
    encoder = hf_arch.convert(tmp_path / "source", "switch", head="EncoderModel")
    expected = ours.model.encoder(some_tokens() % 61).last_hidden_state
    assert_close(encoder.double()(some_tokens() % 61).last_hidden_state, expected, **EXACT)


@pytest.mark.parametrize("sparse", [(0, 0), (4, 1), (9, 1), (1, 3)], ids=str)
def test_sparse_layers_are_where_the_original_has_them(sparse, tmp_path):
    told = dict(zip(("num_sparse_encoder_layers", "num_sparse_decoder_layers"), sparse, strict=True))
    ours, theirs = pair(tmp_path, **told)
    for stack, original in ((ours.model.encoder, theirs.encoder), (ours.model.decoder, theirs.decoder)):
        found = [kind == "switch" for kind in stack.config.feed_forward_types]
        assert found == [block.is_sparse for block in original.block]


def test_what_ours_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match="router_bias is True"):
        pair(tmp_path, router_bias=True)


def test_each_stack_has_a_step_of_its_own():
    fields = {"num_hidden_layers": 6, "encoder_num_hidden_layers": 4}
    config = ROW.tiny_config(sparse_step=3, encoder_sparse_step=1, **fields)
    assert config.feed_forward_types == ["dense", "switch", "dense"] * 2
    assert config.encoder_feed_forward_types == ["switch"] * 4
    config = ROW.tiny_config(**fields)
    assert config.feed_forward_types == ["dense", "switch"] * 3
    assert config.encoder_feed_forward_types == ["dense", "switch"] * 2
    dense = ["dense"] * 2  # a stack without experts stands beside one that has them
    for fields in ({"encoder_feed_forward_types": dense}, {"feed_forward_types": dense, "encoder_sparse_step": 2}):
        model = ROW.load("ForConditionalGeneration")(ROW.tiny_config(**fields)).double()
        told = {"input_ids": some_tokens(), "labels": some_tokens(length=20), "output_router_logits": True}
        assert model(**told).aux_loss > 0
        assert type(model.config).from_dict(model.config.to_dict()).to_dict() == model.config.to_dict()


def test_a_decoder_alone_says_so():
    alone = ROW.tiny_config("ForCausalLM")
    with pytest.raises(ValueError, match="is_decoder=True and is_encoder_decoder=False"):
        ROW.load("ForCausalLM")(ROW.tiny_config("EncoderModel"))
    with pytest.raises(ValueError, match="of one stack alone"):
        ROW.load("ForConditionalGeneration")(alone)
    with pytest.raises(StrictDataclassError, match="set is_encoder_decoder=False"):
        ROW.tiny_config(is_decoder=True)
    with pytest.raises(StrictDataclassError, match="encoder_sparse_step is 0"):
        ROW.tiny_config(encoder_sparse_step=0)


@torch.no_grad()
def test_a_decoder_alone_is_that_of_both_without_its_source():
    """With nothing in what it attends to across, the decoder of both stacks answers as the one alone."""
    whole = Case(ROW, "ForConditionalGeneration").build(scale_logits=True)
    alone = Case(ROW, "ForCausalLM").build(scale_logits=True)
    for layer in whole.model.decoder.layers:
        layer.cross_attention.o_proj.weight.zero_()
    names = {name: weight for name, weight in whole.state_dict().items() if ".encoder." not in name}
    names = {name.replace("model.decoder", "model"): weight for name, weight in names.items()}
    alone.load_state_dict({name: weight for name, weight in names.items() if "cross_attention" not in name})
    tokens = some_tokens()
    assert_close(alone(tokens).logits, whole(tokens, decoder_input_ids=tokens).logits, **EXACT)


@torch.no_grad()
def test_experts_of_every_stack_are_computed_as_asked():
    model = Case(ROW, "ForConditionalGeneration").build()
    model.set_experts_implementation("eager")
    stacks = (model, model.model.encoder, model.model.decoder)
    assert [stack.config._experts_implementation for stack in stacks] == ["eager"] * 3


@pytest.mark.parametrize("weight, dropped, load", [(0.0, 0.688, 1.0), (0.1, 0.2, 0.4)], ids=["without", "with"])
def test_balancing_balances(weight, dropped, load):
    """Routers that begin with all tokens at one expert, which drops 69 % of them: 40 steps of training leave them there
    without the loss; with it, over the last five, 13 % are dropped, and the busiest of four experts takes a third."""
    fields = {"initializer_range": 0.1, "router_aux_loss_coef": weight, "output_router_logits": True}
    torch.manual_seed(0)
    model = ROW.load("ForCausalLM")(ROW.tiny_config("ForCausalLM", **fields)).double().train()
    (router,) = (module.router for module in model.modules() if isinstance(module, SwitchFeedForward))
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(0.2)
        router.gate.weight[0].add_(0.2)
    optimizer, found = torch.optim.AdamW(router.parameters(), lr=0.02), []
    for step in range(41):
        tokens = some_tokens(4, 96, seed=step)
        outputs = model(tokens, labels=tokens)
        outputs.loss.backward()
        optimizer.step(), model.zero_grad()
        found.append(hf_arch.routing_statistics(outputs))
    assert found[0].load.max() == 1 and found[0].dropped.item() == pytest.approx(0.688, abs=1e-3)
    assert sum(each.dropped.item() for each in found[-5:]) / 5 <= dropped + 1e-3
    assert sum(each.load for each in found[-5:]).max() / 5 <= load
    assert weight or found[-1].load.max() == 1


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ADAPTED = {
    "attention": {"target_modules": ATTENTION, "target_parameters": None},
    "router": {"target_modules": ["gate"], "target_parameters": None},
    "experts": {"target_modules": []},
}


@pytest.mark.parametrize("head", ["ForConditionalGeneration", "ForCausalLM"])
@pytest.mark.parametrize("part", ADAPTED)
def test_adapters_of_a_part_train_and_merge(part, head):
    model, tokens = Case(ROW, head).build(), some_tokens()
    model = get_peft_model(model, hf_arch.lora_config(model, r=2, **ADAPTED[part])).double()
    adapters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    where = {"attention": "mixer|cross_attention", "router": "router.gate", "experts": "experts"}[part]
    assert adapters and all("lora_" in name and re.search(where, name) for name in adapters)
    for name, weight in adapters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in adapters.values())
    with torch.no_grad():
        adapted = model.eval()(input_ids=tokens, labels=tokens).logits
        with model.disable_adapter():
            assert (model(input_ids=tokens, labels=tokens).logits - adapted).abs().max() > 0.01
        assert_close(model.merge_and_unload()(input_ids=tokens, labels=tokens).logits, adapted, **EXACT)
