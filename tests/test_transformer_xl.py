"""Transformer-XL answers as transformers' last version of it did, and has the properties that its paper derives.

The golden answers are of `TransfoXLLMHeadModel` in float64, read segment by segment
(`goldens/make_transformer_xl_original.py`).
"""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from hf_arch import find
from hf_arch.bench.worker.serve import ON_CPU
from hf_arch.convert import convert
from promises import Case

GOLDEN = Path(__file__).parent / "goldens" / "transformer_xl_original.safetensors"
MODELS = ("segments", "same_length", "pre_norm", "adaptive", "adaptive_even", "projected")


def checkpoint(folder, model, **more):
    """The golden's model in transformers' layout, and its answers."""
    with safe_open(GOLDEN, "pt") as file:
        fields = json.loads(file.metadata()["configs"])[model]
    told = {"model_type": "transfo-xl", "architectures": ["TransfoXLLMHeadModel"]}
    (folder / "config.json").write_text(json.dumps(fields | told | more))
    tensors = {key.removeprefix(f"{model}."): x for key, x in load_file(GOLDEN).items() if key.startswith(f"{model}.")}
    weights = {key.removeprefix("weights."): x for key, x in tensors.items() if key.startswith("weights.")}
    save_file(weights, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_equals_transformers(model, tmp_path):
    expected = checkpoint(tmp_path, model)
    ours = convert(tmp_path, "transformer_xl").double()
    logits = ours(expected["ids"]).logits
    last = [*range(7, 52, 8), 51]  # of each segment
    assert (logits.log_softmax(-1)[:, last] - expected["logits"]).abs().max() < 1e-8
    first = expected["ids"][:, :8]
    loss = ours(first, labels=first).loss  # in float32, as in all of transformers
    assert loss.item() == pytest.approx(expected["loss"].item(), rel=1e-6)


@torch.no_grad()
def test_same_length_is_read_in_any_pieces(tmp_path):
    expected = checkpoint(tmp_path, "same_length")
    answers = [
        convert(tmp_path, "transformer_xl", segment_length=size).double()(expected["ids"])[0] for size in (8, 50)
    ]
    assert (answers[0] - answers[1]).abs().max() < 1e-8


@torch.no_grad()
def test_a_checkpoint_with_both_of_the_tied(tmp_path):
    """As transformers itself saves them."""
    expected = checkpoint(tmp_path, "segments")
    weights = load_file(tmp_path / "model.safetensors")
    weights["crit.out_layers.0.weight"] = weights["transformer.word_emb.emb_layers.0.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    ours = convert(tmp_path, "transformer_xl").double()
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert (ours(expected["ids"]).logits.log_softmax(-1)[:, -1] - expected["logits"][:, -1]).abs().max() < 1e-8
    weights["crit.out_layers.0.weight"] += 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="tied, but differ"):
        convert(tmp_path, "transformer_xl")


@pytest.mark.parametrize(
    "fields, said", [({"attn_type": 1}, "attn_type is 1"), ({"sample_softmax": 5}, "sample_softmax")]
)
def test_choices_of_the_original_that_ours_does_not_have(fields, said, tmp_path):
    checkpoint(tmp_path, "segments", **fields)
    with pytest.raises(ValueError, match=said):
        convert(tmp_path, "transformer_xl")


def transformer_xl(**fields):
    """A small model in float64."""
    row = find("transformer_xl")
    torch.manual_seed(0)
    return row.load("ForCausalLM")(row.tiny_config("ForCausalLM", initializer_range=0.2, **fields)).double().eval()


@torch.no_grad()
@pytest.mark.parametrize("same_length", [False, True])
def test_a_token_sees_as_far_as_the_definition_says(tokens, same_length):
    model, changed = transformer_xl(same_length=same_length), tokens.clone()
    changed[:, 10] = 3 + changed[:, 10] % 90
    differs = (model(changed).logits - model(tokens).logits).abs().amax((0, 2)).gt(1e-12).nonzero().flatten()
    # Token 10 is seen up to the end of the last segment that begins 20 or fewer tokens later: 16 + 15 = 31; what was
    # read there, up to the end of the segment at 48. With same_length, up to 20 tokens later in each of two layers.
    assert differs.min() == 10 and differs.max() == (10 + 2 * 20 if same_length else 63)


def test_gradients_stop_at_the_start_of_a_segment(tokens):
    model = transformer_xl().train()
    embeds = model.model.embed_tokens(tokens).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[:, 40].sum().backward()
    reached = embeds.grad.abs().sum((0, 2)).nonzero().flatten()
    assert reached.min() == 32 and reached.max() == 40


def test_memory_trains_the_weights_that_look_at_it(tokens):
    """As in the paper, keys of the memory are made by the weights of now."""
    model = transformer_xl(num_hidden_layers=1).train()
    model(tokens).logits[:, 32].sum().backward()  # alone in its segment, but for the memory
    projection = model.model.layers[0].mixer.k_proj
    found, projection.weight.grad = projection.weight.grad, None
    model(tokens[:, :33]).logits[:, 32].sum().backward()
    torch.testing.assert_close(projection.weight.grad, found, atol=1e-8, rtol=1e-8)
    assert found.abs().max() > 1e-3


@torch.no_grad()
def test_the_state_is_the_memory_and_the_segment(tokens):
    for same_length, held in ((False, 16 + 20 - 1), (True, 20)):
        cache = transformer_xl(same_length=same_length)(tokens, use_cache=True).past_key_values
        assert [layer.states["memory_key"].shape[1] for layer in cache.layers] == [held, held]


@torch.no_grad()
def test_a_memory_of_the_whole_text_is_one_long_segment(tokens):
    segments = transformer_xl(segment_length=10, memory_length=60)
    whole = transformer_xl(segment_length=70, memory_length=1)
    whole.load_state_dict(segments.state_dict())
    expected = whole(tokens, output_hidden_states=True).hidden_states
    for found, layer in zip(segments(tokens, output_hidden_states=True).hidden_states, expected, strict=True):
        assert (found - layer).abs().max() < 1e-8


@torch.no_grad()
def test_evaluation_is_faster_than_a_sliding_window_the_more_it_sees():
    """A vanilla model that names one token after `seen` reads them all again (section 4.4, table 9): the speed-up grows
    as fast as what is seen."""
    speed_up = []
    for seen in (32, 64, 128):
        model = transformer_xl(segment_length=16, memory_length=seen).float()
        ids, cost = torch.full((1, 4 * seen), 5), []
        for text in (ids, ids[:, :seen]):
            with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
                model(text, use_cache=False)
            cost.append(counter.get_total_flops())
        speed_up.append(cost[1] / (cost[0] / ids.shape[1]))
    assert speed_up[0] > 10 and all(after / before > 1.5 for before, after in zip(speed_up, speed_up[1:], strict=False))


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"memory_length": 0}, "memory_length is 0"),
        ({"residual_type": "deep_norm"}, "residual_type 'deep_norm' is unknown"),
        ({"cutoffs": [50, 20]}, "must grow"),
        ({"cutoffs": [20, 96]}, "must grow"),
        ({"cutoffs": [20, 50], "div_val": 8}, "cannot be divided by div_val 8"),
        ({"cutoffs": [20, 50], "tie_projections": [True]}, "tie_projections has 1 entries for 3 clusters"),
    ],
)
def test_contradictory_configs_fail(fields, said):
    with pytest.raises(StrictDataclassError, match=said):
        transformer_xl(**fields)


@torch.no_grad()
def test_an_adaptive_softmax_names_every_word(tokens):
    probability = transformer_xl(cutoffs=[20, 50], div_val=2)(tokens).logits.exp()
    torch.testing.assert_close(probability.sum(-1), torch.ones_like(probability[..., 0]))


def test_a_frozen_relative_key_follows_its_adapter(tokens):
    """What is kept in evaluation is made again when an adapter is turned off."""
    model = (
        get_peft_model(transformer_xl(), LoraConfig(target_modules=["r_proj"], init_lora_weights=False)).double().eval()
    )
    with torch.no_grad():
        adapted = model(tokens).logits
        with model.disable_adapter():
            base = model(tokens).logits
        assert (base - adapted).abs().max() > 1e-3
        torch.testing.assert_close(model(tokens).logits, adapted)


@torch.no_grad()
def test_steps_slide_through_a_room_and_can_go_back(tokens):
    model, cache = transformer_xl(), None
    places = []
    for n in range(70):
        cache = model(tokens[:, n : n + 1], past_key_values=cache, use_cache=True).past_key_values
        places.append(cache.layers[0].states["memory_key"].untyped_storage().data_ptr())
        if n == 59:
            for layer in cache.layers:
                layer.activate_past_recording()
    assert len(set(places[1:])) < 15  # states of 35 tokens, with room for 8 more
    cache.crop(-6)
    other = tokens.flip(1)[:, :6]
    logits = [model(other[:, n : n + 1], past_key_values=cache).logits for n in range(6)]
    whole = model(torch.cat((tokens[:, :64], other), dim=1)).logits[:, 64:]
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("name", ["transformer_xl", "reformer", "sparse_transformer"])
def test_steps_go_on_outside_of_inference_mode(name, tokens):
    fields = {"layer_types": ["retrieval_attention"] * 2, "retrieval_block_size": 4} if "sparse" in name else {}
    model, cache = Case(find(name), "ForCausalLM").build(**fields), None
    whole, logits = model(tokens).logits, []
    for n, mode in enumerate([torch.inference_mode, torch.no_grad, torch.enable_grad, torch.no_grad] * 4):
        with mode():
            step = model(tokens[:, n : n + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        logits.append(step.logits.detach())
    torch.testing.assert_close(torch.cat(logits, dim=1), whole[:, :16], atol=1e-8, rtol=1e-8)
