"""Hyena answers as the authors' code does, keeps filters that are those of its parameters, and can be distilled.

The golden answers are those of the authors' standalone HyenaDNA, in float64 (`goldens/make_hyena_original.py`).
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import hf_arch
from hf_arch import find
from hf_arch.convert import convert
from hf_arch.modeling.layers.derived import Derived
from hf_arch.remake.distill import fit
from promises import EXACT, ROWS, some_tokens

GOLDEN = Path(__file__).parent / "goldens" / "hyena_original.safetensors"
CASE = next(case for case in ROWS if case.row.name == "hyena")


def checkpoint(folder, model, rename=lambda name: name, **more):
    """The golden's model in the layout of the authors, as a checkpoint of Lightning, and what it answers."""
    with safe_open(GOLDEN, "pt") as file:
        fields = json.loads(file.metadata()["configs"])[model]
    found = {key.removeprefix(f"{model}."): x for key, x in load_file(GOLDEN).items() if key.startswith(f"{model}.")}
    weights = {rename(key.removeprefix("weights.")): x for key, x in found.items() if key.startswith("weights.")}
    weights["model.lm_head.weight"] = weights["model.backbone.embeddings.word_embeddings.weight"].clone()
    (folder / "config.json").write_text(json.dumps(fields | more))
    torch.save({"state_dict": weights, "epoch": 3}, folder / "weights.ckpt")
    return found


@torch.no_grad()
@pytest.mark.parametrize("model", ["released", "third order"])
def test_equals_the_authors_code(model, tmp_path):
    expected = checkpoint(tmp_path, model)
    ours = convert(tmp_path, "hyena").double()
    hidden = ours.model(expected["ids"]).last_hidden_state
    assert hidden.std() > 0.5
    assert_close(hidden, expected["hidden_states"], **EXACT)
    head = ours.model.embed_tokens.weight
    assert ours.lm_head.weight is head and ours.config.vocab_size == 16
    assert_close(ours(expected["ids"]).logits, expected["hidden_states"] @ head.T, **EXACT)


@torch.no_grad()
def test_a_checkpoint_of_gradient_checkpointing(tmp_path):
    wrapped = lambda name: name.replace(".mixer.", ".mixer.layer.").replace(".mlp.", ".mlp.layer.")  # noqa: E731
    expected = checkpoint(tmp_path, "released", wrapped, checkpoint_mixer=True, checkpoint_mlp=True)
    ours = convert(tmp_path, "hyena", head="Model").double()
    assert_close(ours(expected["ids"]).last_hidden_state, expected["hidden_states"], **EXACT)


@torch.no_grad()
def test_the_layout_for_transformers(tmp_path):
    expected = checkpoint(tmp_path, "released")
    tensors = torch.load(tmp_path / "weights.ckpt", weights_only=True)["state_dict"]
    (tmp_path / "weights.ckpt").unlink()
    tensors = {name.replace("model.backbone", "hyena.backbone"): tensor for name, tensor in tensors.items()}
    tensors = {
        name: tensor for name, tensor in tensors.items() if not name.endswith(("3.freq", "5.freq", "lm_head.weight"))
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    fields = {"model_type": "hyenadna", "architectures": ["HyenaDNAForCausalLM"], "d_model": 12, "n_layer": 2}
    fields |= {"d_inner": 16, "vocab_size": 12, "pad_vocab_size_multiple": 8, "max_seq_len": 100, "emb_dim": 5}
    fields |= {"filter_order": 16, "hyena_order": 2, "short_filter_order": 3, "activation_freq": 10}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours = convert(tmp_path, "hyena").double()
    assert_close(ours.model(expected["ids"]).last_hidden_state, expected["hidden_states"], **EXACT)


def test_what_cannot_be_converted_is_refused(tmp_path):
    checkpoint(tmp_path, "released", attn_layer_idx=[1])
    with pytest.raises(ValueError, match="attn_layer_idx"):
        convert(tmp_path, "hyena")
    checkpoint(tmp_path, "released")
    saved = torch.load(tmp_path / "weights.ckpt", weights_only=True)
    saved["state_dict"]["model.backbone.layers.1.mixer.filter_fn.pos_emb.z"] += 0.1
    torch.save(saved, tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match="pos_emb.z was trained"):
        convert(tmp_path, "hyena")


def smooth_model(**fields):
    """One with small weights in the network that makes the filters: they are no noise."""
    model = CASE.build(**fields, filter_frequency=10.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".filter." in name and "_proj" in name and parameter.ndim == 2:
                parameter.mul_(0.3)
    return model


@torch.no_grad()
@pytest.mark.parametrize("order", [2, 3])
def test_distilled_filters_are_near_and_answer_alike(order, tmp_path):
    model, tokens = smooth_model(hyena_order=order), some_tokens(2, 200)
    expected = model(tokens).logits
    found = []
    for states in (2, 16):
        distilled, errors = hf_arch.distill(model, state_size=states)
        assert [*errors] == [f"model.layers.{i}.mixer.filter" for i in range(2)]
        assert all(error.shape == (32 * (order - 1),) for error in errors.values())
        found.append((distilled(tokens).logits - expected).std() / expected.std())
        for i, layer in enumerate(distilled.model.layers):
            modes, theirs = layer.mixer.filter(), model.model.layers[i].mixer.filter(256)
            impulse = torch.zeros(1, 256, 32, dtype=torch.float64)
            impulse[:, 0] = 1
            for mode, implicit in zip(modes, theirs, strict=True):
                response = layer.mixer.convolve(impulse, mode, None, None, 0)[0][0].T
                assert_close(response[:, 0], implicit.kernel[:, 0])
    assert found[1] < 0.1 and found[1] < 0.3 * found[0]
    assert max(error.max() for error in errors.values()) < 0.3
    assert_close(model(tokens).logits, expected, **EXACT)

    distilled.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert_close(loaded(tokens).logits, distilled(tokens).logits, **EXACT)
    caches = [loaded(tokens[:, :length], use_cache=True).past_key_values for length in (20, 200)]
    sizes = [sum(state.numel() for layer in cache.layers for state in layer.states.values()) for cache in caches]
    assert sizes[0] == sizes[1]
    assert torch.isfinite(loaded(some_tokens(1, 700)).logits).all()  # past the time of the filters, too


@torch.no_grad()
def test_a_sum_of_waves_is_found_again():
    rate, turn = torch.tensor([[0.01, 0.05]]).double(), torch.tensor([[0.3, 0.0]]).double()
    places = torch.arange(400).double()
    weight = torch.tensor([[1.0 - 0.5j, 2.0]], dtype=torch.complex128)
    kernel = (weight[..., None] * torch.exp(torch.complex(-rate, turn)[..., None] * places)).real.sum(1)
    rate_log, turned, readout, skip, error = fit(kernel, 2)
    assert error < 1e-8 and skip.abs() < 1e-8
    order = rate_log.argsort()
    assert_close(rate_log.gather(1, order).exp(), rate)
    assert_close(turned.gather(1, order), turn, atol=1e-7, rtol=0)


def test_what_cannot_be_distilled_is_refused():
    with pytest.raises(ValueError, match="no implicit filters"):
        hf_arch.distill(find("retnet").load("ForCausalLM")(find("retnet").tiny_config()))


def kept_or_not(model, tokens):
    """What it answers, with filters that it kept if it did, and that of a copy that kept none."""
    fresh = copy.deepcopy(model)
    for module in fresh.modules():
        if isinstance(module, Derived):
            module.made.clear()
    return model(input_ids=tokens).logits, fresh(input_ids=tokens).logits


@torch.no_grad()
def test_kept_filters_are_those_of_the_parameters():
    model, tokens = CASE.build(), some_tokens()
    filter_ = model.model.layers[0].mixer.filter
    before = model(tokens).logits
    kept = filter_.made["filters"]
    assert_close(model(tokens).logits, before, **EXACT)
    assert filter_.made["filters"] is kept
    other = {name: tensor * 1.1 for name, tensor in model.state_dict().items()}
    changes = {
        "in place": lambda: filter_.second_proj.weight.mul_(1.2),
        "load_state_dict": lambda: model.load_state_dict(other),
        "assigned": lambda: model.load_state_dict({n: t * 1.1 for n, t in other.items()}, assign=True),
        "data": lambda: setattr(filter_.bias, "data", filter_.bias.data + 1),
        "data in place, then eval": lambda: (filter_.tap_proj.weight.data.mul_(1.5), model.eval()),
    }
    for name, change in changes.items():
        change()
        found, fresh = kept_or_not(model, tokens)
        assert_close(found, fresh, **EXACT, msg=name)
        assert (found - before).abs().max() > 1e-3, name
        before = found
    model.float()
    assert model(tokens).logits.dtype == filter_.made["filters"][1][0].kernel.dtype == torch.float32
    model.double()
    with torch.inference_mode():
        model(tokens)
        assert not filter_.made["filters"][1][0].kernel.is_inference()
        model.float()(tokens)  # parameters whose changes nobody counts
        assert not filter_.made


def test_kept_filters_follow_adapters_and_training():
    tokens = some_tokens()
    model = get_peft_model(CASE.build(), hf_arch.lora_config(CASE.config(), r=2)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and ".filter." in name:
                parameter.normal_(std=0.3)
        adapted = model(input_ids=tokens).logits
        with model.disable_adapter():
            base, fresh = kept_or_not(model, tokens)
            assert_close(base, fresh, **EXACT)
        assert (base - adapted).abs().max() > 1e-3
        assert_close(model(input_ids=tokens).logits, adapted, **EXACT)
        model.merge_adapter()
        assert_close(model(input_ids=tokens).logits, adapted, **EXACT)
        model.unmerge_adapter()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        with torch.no_grad():
            found, fresh = kept_or_not(model.eval(), tokens)
        assert_close(found, fresh, **EXACT)


@torch.no_grad()
def test_texts_longer_than_the_filters_are_refused():
    model, tokens = CASE.build(max_position_embeddings=64), some_tokens(1)
    cache = model(tokens[:, :60], use_cache=True).past_key_values
    steps = [model(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(60, 64)]
    assert_close(torch.cat(steps, dim=1), model(tokens[:, :64]).logits[:, 60:], **EXACT)
    for told in ({"input_ids": tokens}, {"input_ids": tokens[:, 64:65], "past_key_values": cache}):
        with pytest.raises(ValueError, match="no time past 64"):
            model(**told)
    packed = torch.arange(70) % 35  # two documents of 35
    alone = torch.cat([model(part).logits for part in tokens.split(35, dim=1)], dim=1)
    assert_close(model(tokens, position_ids=packed[None]).logits, alone, **EXACT)
    with pytest.raises(ValueError, match="no time past 64"):
        model.generate(tokens[:, :50], max_new_tokens=20, cache_implementation="static", eos_token_id=None)


def test_a_longer_time_is_another_filter():
    """Time is counted in longest texts: the same weights, another unit."""
    short, long = (CASE.build(max_position_embeddings=length).model.layers[0].mixer.filter for length in (65, 129))
    for one, other in zip(short.kernels(65), long.kernels(129), strict=True):
        assert (one[:, 1:] - other[:, 1:65]).abs().max() > 1e-2
    features, other = short.time_features(65, torch.float64), long.time_features(129, torch.float64)
    assert_close(features[0], other[0][::2])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hyena_order": 1}, "at least 2"),
        ({"filter_emb_dim": 4}, "must be odd"),
        ({"state_size": 0}, "state_size is 0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    ],
)
def test_configs_that_contradict_themselves(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        find("hyena").tiny_config(**fields)
