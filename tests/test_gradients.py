"""Promise 6: gradients reach every parameter and survive checkpointing, low precision and compilation."""

import re

import pytest
import torch
from torch.testing import assert_close

from promises import DECODERS, ENCODERS, EXACT, held_choices, inputs_and_labels, sums
from variants import IDLE


def gradients(model, inputs):
    model.zero_grad()
    outputs = model(**inputs)
    (outputs.last_hidden_state.pow(2).sum() if "loss" not in outputs else outputs.loss).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_every_parameter_gets_a_gradient(head_case):
    model = head_case.build().train()
    found = gradients(model, inputs_and_labels(head_case, model))
    names = {name for name, _ in model.named_parameters()}
    assert found.keys() == names
    found.pop("qa_outputs.bias", None)  # what is added at all positions changes no share: its gradient is rounding
    reached = {name for name, gradient in found.items() if gradient.any()} | {"qa_outputs.bias"}
    idle = IDLE.get(head_case.row.name, {}).get(head_case.head, "")
    assert not [name for name in names if (name in reached) == bool(re.fullmatch(idle, name))]


@pytest.mark.parametrize("case", [*DECODERS, *ENCODERS], ids=str)
def test_every_choice_gets_a_gradient(case, tokens):
    model = case.build().train()
    found = gradients(model, {"input_ids": tokens, "labels": tokens})
    assert not [name for name, parameter in model.named_parameters() if name not in found or not found[name].any()]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", [*DECODERS, *ENCODERS], ids=str)
def test_gradient_checkpointing_gives_the_same_gradients(case, tokens, reentrant):
    model = case.build()
    inputs = {"input_ids": tokens, "labels": tokens}
    plain = gradients(model.train(), inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    checkpointed = gradients(model, inputs)
    assert checkpointed.keys() == plain.keys()
    for name in plain:
        assert_close(checkpointed[name], plain[name], **EXACT, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_low_precision_is_close_and_keeps_wide_states(model_case, tokens, dtype):
    model = model_case.build(dtype=torch.float32, initializer_range=0.08)
    told = {"use_cache": True} if model.can_generate() else {}
    with held_choices():
        expected = model(tokens, **told)
        with torch.autocast("cpu", dtype=dtype):
            mixed = model(tokens, **told)
            step = model(tokens[:, :1], past_key_values=mixed.past_key_values) if told else mixed
        low = model.to(dtype)(tokens, **told)
    for outputs in (mixed, low):
        assert (outputs.logits - expected.logits).std() < 0.05 * expected.logits.std()
    assert torch.isfinite(step.logits).all() and low.logits.dtype == dtype
    for outputs in (mixed, low) if told else ():
        assert {state.dtype for state in sums(outputs.past_key_values)} <= {torch.float32}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_attention_implementations_agree_and_weights_are_recorded(decoder_case, tokens, attention):
    decoder = decoder_case.decoder(dtype=torch.float32)  # transformers' eager softmax turns float64 masks into nan
    expected = decoder(tokens).logits
    decoder.set_attn_implementation(attention)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    outputs = decoder(tokens, attention_mask=mask, output_attentions=attention == "eager", output_hidden_states=True)
    assert_close(outputs.logits[0], expected[0], atol=1e-4, rtol=1e-4)
    of_text = "decoder_" if decoder_case.answers else ""
    assert len(outputs[f"{of_text}hidden_states"]) == decoder.config.num_hidden_layers + 1
    if attention == "eager":
        kinds = [kind for kind in decoder.config.layer_types if "attention" in kind]
        recorded = outputs.get(f"{of_text}attentions") or ()
        assert len(recorded) == len(kinds)
        for weights in (*recorded, *outputs.get("cross_attentions", ())):
            assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.fixture
def marked_memory():
    """What nobody has written is nan, so that who reads it is found out."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # in this mode torch fills it
    yield
    torch.use_deterministic_algorithms(False)


def test_compiled_equals_eager(model_case, tokens, marked_memory):
    model = model_case.build(**model_case.shallow())
    inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    plain = gradients(model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    compiled(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, plain[name], **EXACT, msg=lambda said, name=name: f"{name}: {said}")


@torch.no_grad()
def test_inductor_equals_eager(tokens):
    from promises import ROWS

    case = next(case for case in ROWS if case.row.name == "retnet")  # it compiles C++: one row stands for all
    model, tokens = case.build(dtype=torch.float32, num_hidden_layers=1), tokens[:, :20]
    expected = model(tokens, use_cache=False).logits
    torch._dynamo.reset()
    assert_close(torch.compile(model)(tokens, use_cache=False).logits, expected, atol=1e-3, rtol=1e-3)


def test_logits_to_keep_and_items_in_batch(row_case, tokens):
    model = row_case.build()
    whole = model(tokens, labels=tokens)
    assert_close(model(tokens, logits_to_keep=3).logits, whole.logits[:, -3:], **EXACT)
    summed = model(tokens, labels=tokens, num_items_in_batch=torch.tensor(10)).loss
    named = 70 if row_case.answers else 69  # a text goes on from its first token, an answer begins with it
    assert_close(summed, whole.loss * 2 * named / 10, atol=1e-5, rtol=1e-5)
    embeds = model.get_input_embeddings()(tokens)
    assert_close(model(inputs_embeds=embeds, labels=tokens).loss, whole.loss, **EXACT)
