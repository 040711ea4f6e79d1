"""Mixtral against transformers' own, in float64 at weights where attention and routing are far from uniform."""

import pytest
import torch
import transformers
from originals import LLAMA, scaled_up
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers.models.mixtral import modeling_mixtral

import hf_arch
from hf_arch.modeling.moe.mixtral import conversion_mixtral
from promises import EXACT, some_tokens

FIELDS = LLAMA | {"num_local_experts": 5, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}
CLASSES = ("MixtralForCausalLM", "MixtralModel", "MixtralForSequenceClassification", "MixtralForTokenClassification")


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """transformers' Mixtral narrows to float32 in norms, rotations and routers, in a float64 model too. Here not."""

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def turns(self, x, position_ids):
        angle = position_ids[..., None] * self.inv_freq.to(x.dtype)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos(), angle.sin()

    def route(self, x):
        logits = torch.nn.functional.linear(x.flatten(0, -2), self.weight)
        weight, index = logits.softmax(-1).topk(self.top_k, dim=-1)
        return logits, weight / weight.sum(-1, keepdim=True), index

    monkeypatch.setattr(modeling_mixtral.MixtralRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_mixtral.MixtralRotaryEmbedding, "forward", turns)
    monkeypatch.setattr(modeling_mixtral.MixtralTopKRouter, "forward", route)


def original(name: str = "MixtralForCausalLM", **more):
    config = transformers.MixtralConfig(**FIELDS | more, experts_implementation="eager")
    return scaled_up(getattr(transformers, name)(config))


def pair(folder, name: str = "MixtralForCausalLM", **more):
    """Ours and theirs, with the same weights, in float64."""
    theirs = original(name, **more)
    theirs.save_pretrained(folder)
    return hf_arch.convert(folder, "mixtral").double(), theirs.double()


def padded(side: str) -> dict[str, torch.Tensor]:
    ids = some_tokens(length=40) % 61
    mask = torch.ones_like(ids)
    mask[1, slice(0, 7) if side == "left" else slice(-7, None)] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("fields", [{}, {"sliding_window": 9}, {"head_dim": 12, "num_experts_per_tok": 5}], ids=str)
@torch.no_grad()
def test_equals_the_original(name, fields, tmp_path):
    ours, theirs = pair(tmp_path, name, **fields)
    for side in ("right", "left"):
        told = padded(side)
        if name == "MixtralForSequenceClassification":
            told["input_ids"] = told["input_ids"] * told["attention_mask"]  # theirs looks for the padding itself
        mine, expected = ours(**told)[0], theirs(**told)[0]
        real = told["attention_mask"].bool()
        assert mine.dtype == expected.dtype == torch.float64
        assert_close(*(each[real] if each.ndim == 3 else each for each in (mine, expected)), **EXACT)


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_losses_and_gradients_equal_the_original(side, tmp_path):
    ours, theirs = pair(tmp_path)
    told = padded(side) if side else {"input_ids": some_tokens() % 61}
    labels = told["input_ids"].masked_fill(told.get("attention_mask", 1 + 0 * told["input_ids"]) == 0, -100)
    mine, expected = (model(**told, labels=labels, output_router_logits=True) for model in (ours, theirs))
    for logits, others in zip(mine.router_logits, expected.router_logits, strict=True):
        real = told["attention_mask"].flatten().bool() if side else slice(None)
        assert_close(logits[real], others[real], **EXACT)
    in_float32 = {"atol": 1e-6, "rtol": 1e-6}  # theirs counts, and takes the cross-entropy, in float32
    assert_close(mine.aux_loss, expected.aux_loss.double(), **in_float32)
    assert_close(mine.loss.double(), expected.loss.double(), **in_float32)
    without = ours(**told, labels=labels).loss
    assert_close(mine.loss - without, 0.1 * mine.aux_loss, **in_float32, check_dtype=False)
    mine.loss.backward(), expected.loss.backward()
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    gradients = conversion_mixtral.MIXTRAL.translate(gradients, theirs.config.to_dict(), ours)
    for name, weight in ours.named_parameters():
        assert_close(weight.grad, gradients[name], atol=1e-6, rtol=1e-5, msg=name)


@torch.no_grad()
def test_cached_steps_and_generation_equal_the_original(tmp_path):
    ours, theirs = pair(tmp_path)
    tokens = some_tokens(length=20) % 61
    mine, expected = (model(tokens[:, :15], use_cache=True) for model in (ours, theirs))
    for t in range(15, 20):
        step = tokens[:, t : t + 1]
        mine = ours(step, past_key_values=mine.past_key_values)
        expected = theirs(step, past_key_values=expected.past_key_values)
        assert_close(mine.logits, expected.logits, **EXACT)
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(tokens, **greedy), theirs.generate(tokens, **greedy))


@pytest.mark.parametrize("layout", ["hub", "stacked"])
@torch.no_grad()
def test_layouts_of_checkpoints(layout, tmp_path, capsys):
    theirs = original()
    theirs.save_pretrained(tmp_path, save_original_format=layout == "hub")
    names = "".join(load_file(tmp_path / "model.safetensors"))
    assert ("block_sparse_moe.experts.4.w3.weight" in names) == (layout == "hub")
    ours = hf_arch.convert(tmp_path, "mixtral", output=tmp_path / "ours", verify=True)
    assert float(capsys.readouterr().out.split()[-1]) < 1e-6
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert_close(loaded.state_dict(), ours.state_dict(), atol=0, rtol=0)
    assert loaded.config.num_local_experts == 5 and loaded.config.router_aux_loss_coef == 0.1


def test_an_incomplete_expert_is_named(tmp_path):
    original().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers.1\S*experts.gate_up_proj lacks w3 of expert 3"):
        hf_arch.convert(tmp_path, "mixtral")


def test_what_ours_does_not_have_is_refused(tmp_path):
    original(router_jitter_noise=0.1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="router_jitter_noise is 0.1"):
        hf_arch.convert(tmp_path, "mixtral")
