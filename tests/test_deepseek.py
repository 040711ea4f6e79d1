"""DeepSeek-V2 and V3 against transformers' own, in float64 at weights where attention and routing are not uniform."""

import pytest
import torch
import transformers
from originals import LLAMA, scaled_up
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3

import hf_arch
from hf_arch.modeling.moe.deepseek import conversion_deepseek
from promises import EXACT, some_tokens

MODULES = {"V2": modeling_deepseek_v2, "V3": modeling_deepseek_v3}
FIELDS = LLAMA | {"num_key_value_heads": 4, "num_hidden_layers": 3, "first_k_dense_replace": 1}
FIELDS |= {"kv_lora_rank": 12, "q_lora_rank": 20, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
FIELDS |= {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 10, "n_shared_experts": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0}
YARN |= {"mscale": 0.707, "mscale_all_dim": 0.5, "beta_fast": 32, "beta_slow": 1}
CHOICES = {
    "lite": ("V2", {"q_lora_rank": None, "topk_method": "greedy", "rope_parameters": YARN}),
    "groups": (
        "V2",
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
    ),
    "v3": ("V3", {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "rope_parameters": YARN}),
    "v3 raw": (
        "V3",
        {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "q_lora_rank": None, "attention_bias": True},
    ),
}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """transformers' own narrow to float32 in norms, rotations and routers, in a float64 model too. Here not."""

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def turns(self, x, position_ids):
        angle = position_ids[..., None] * self.inv_freq.to(x.dtype)
        if isinstance(self, modeling_deepseek_v2.DeepseekV2RotaryEmbedding):
            return torch.polar(torch.ones_like(angle), angle) * self.attention_scaling
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling

    for name, module in MODULES.items():
        monkeypatch.setattr(getattr(module, f"Deepseek{name}RMSNorm"), "forward", norm)
        monkeypatch.setattr(getattr(module, f"Deepseek{name}RotaryEmbedding"), "forward", turns)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)
    kept = torch.Tensor.type
    monkeypatch.setattr(torch.Tensor, "type", lambda x, *told: x if told == (torch.float32,) else kept(x, *told))
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim, dtype=None: softmax(x, dim))


def original(choice: str, head: str = "ForCausalLM", **more):
    name, fields = CHOICES[choice]
    config = getattr(transformers, f"Deepseek{name}Config")(**FIELDS | fields | more, experts_implementation="eager")
    model = scaled_up(getattr(transformers, f"Deepseek{name}{head}")(config))
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            bias.copy_(0.2 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(3)))
    return model


def pair(folder, choice: str, head: str = "ForCausalLM", **more):
    """Ours and theirs, with the same weights, in float64."""
    theirs = original(choice, head, **more)
    theirs.save_pretrained(folder)
    return hf_arch.convert(folder, "deepseek").double(), theirs.double()


def padded(side: str) -> dict[str, torch.Tensor]:
    ids = some_tokens(length=40) % 61
    mask = torch.ones_like(ids)
    mask[1, slice(0, 7) if side == "left" else slice(-7, None)] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@pytest.mark.parametrize("choice", CHOICES)
@torch.no_grad()
def test_equals_the_original(choice, tmp_path):
    ours, theirs = pair(tmp_path, choice)
    for side in ("right", "left"):
        told = padded(side)
        mine, expected = ours(**told).logits, theirs(**told).logits
        real = told["attention_mask"].bool()
        assert mine.dtype == expected.dtype == torch.float64
        assert_close(mine[real], expected[real], **EXACT)


@pytest.mark.parametrize("choice, head", [("lite", "Model"), ("v3", "Model"), ("v3", "ForTokenClassification")])
@torch.no_grad()
def test_other_heads_equal_the_original(choice, head, tmp_path):
    ours, theirs = pair(tmp_path, choice, head)
    tokens = some_tokens(length=30) % 61
    assert_close(ours(tokens)[0], theirs(tokens)[0], **EXACT)


@pytest.mark.parametrize("choice", ["lite", "groups", "v3"])
def test_gradients_equal_the_original(choice, tmp_path):
    ours, theirs = pair(tmp_path, choice)
    told = padded("right")
    labels = told["input_ids"].masked_fill(told["attention_mask"] == 0, -100)
    for model in (ours, theirs):
        logits = model(**told).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    fields = theirs.config.to_dict()
    conversion = next(each for each in conversion_deepseek.CONVERSIONS if each.takes(fields))
    biases = {name: value for name, value in theirs.named_buffers() if name.endswith("correction_bias")}
    expected = conversion.translate(gradients | biases, fields, ours)
    for name, weight in ours.named_parameters():
        assert_close(weight.grad, expected[name], **EXACT, msg=name)


@pytest.mark.parametrize("choice", ["lite", "v3"])
@torch.no_grad()
def test_cached_steps_and_generation_equal_the_original(choice, tmp_path):
    ours, theirs = pair(tmp_path, choice)
    tokens = some_tokens(length=20) % 61
    mine, expected = (model(tokens[:, :15], use_cache=True) for model in (ours, theirs))
    for t in range(15, 20):
        step = tokens[:, t : t + 1]
        mine = ours(step, past_key_values=mine.past_key_values)
        expected = theirs(step, past_key_values=expected.past_key_values)
        assert_close(mine.logits, expected.logits, **EXACT)
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(ours.generate(tokens, **greedy), theirs.generate(tokens, **greedy))


@pytest.mark.parametrize("choice", ["lite", "v3"])
@pytest.mark.parametrize("layout", ["hub", "stacked"])
@torch.no_grad()
def test_layouts_of_checkpoints(choice, layout, tmp_path, capsys, monkeypatch):
    theirs = original(choice)
    theirs.save_pretrained(tmp_path, save_original_format=layout == "hub")
    names = "".join(load_file(tmp_path / "model.safetensors"))
    assert ("mlp.experts.7.up_proj.weight" in names) == (layout == "hub")
    ours = hf_arch.convert(tmp_path, "deepseek", output=tmp_path / "ours", verify=True)
    assert float(capsys.readouterr().out.split()[-1]) < 1e-6
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert_close(loaded.state_dict(), ours.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize(
    "choice, fields, message",
    [
        ("lite", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("v3", {"rope_interleave": False}, "rope_interleave is False"),
        ("v3", {"num_key_value_heads": 2, "num_attention_heads": 4}, "num_key_value_heads is 2"),
    ],
)
def test_what_ours_does_not_have_is_refused(choice, fields, message, tmp_path):
    original(choice, **fields).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        hf_arch.convert(tmp_path, "deepseek")


def with_further_layer(folder):
    """A checkpoint of V3 as it was released: its layer of multi-token prediction behind the others."""
    theirs = original("v3")
    theirs.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    last = {name: tensor for name, tensor in weights.items() if ".layers.2." in name}
    further = {name.replace(".layers.2.", ".layers.3."): 0.5 * tensor for name, tensor in last.items()}
    norms = {name: torch.rand(32) for name in ("enorm", "hnorm", "shared_head.norm")}
    further |= {f"model.layers.3.{name}.weight": tensor for name, tensor in norms.items()}
    further["model.layers.3.eh_proj.weight"] = torch.randn(32, 64)
    further["model.layers.3.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    further["model.layers.3.shared_head.head.weight"] = weights["lm_head.weight"].clone()
    save_file(weights | further, folder / "model.safetensors", {"format": "pt"})
    return theirs


@torch.no_grad()
def test_layers_of_multi_token_prediction_are_taken_over_where_asked_for(tmp_path):
    theirs, tokens = with_further_layer(tmp_path), some_tokens(length=30) % 61
    without = hf_arch.convert(tmp_path, "deepseek")
    assert not [name for name in without.state_dict() if "mtp" in name]
    ours = hf_arch.convert(tmp_path, "deepseek", num_nextn_predict_layers=1)
    assert_close(ours(tokens).logits, without(tokens).logits, **EXACT)
    weights, last = ours.state_dict(), "model.layers.2.feed_forward.experts.gate_up_proj"
    assert_close(weights["model.mtp.0.layer.feed_forward.experts.gate_up_proj"], 0.5 * weights[last])
    model = hf_arch.convert(tmp_path, "deepseek", head="Model", num_nextn_predict_layers=1)
    assert not [name for name in model.state_dict() if "mtp" in name]
    assert theirs.config.num_mtp_layers == 1


def test_the_loss_of_a_further_token_is_that_of_transformers(tmp_path):
    theirs, tokens = with_further_layer(tmp_path).double(), some_tokens(length=30) % 61
    weights = load_file(tmp_path / "model.safetensors")
    layer = MtpLayer(
        theirs.config, modeling_deepseek_v3.DeepseekV3DecoderLayer, modeling_deepseek_v3.DeepseekV3RMSNorm, 2
    )
    block = {f"mtp_block.{name}": 0.5 * tensor for name, tensor in theirs.model.layers[2].state_dict().items()}
    names = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "post_norm": "shared_head.norm"}
    own = {f"{name}.weight": weights[f"model.layers.3.{told}.weight"] for name, told in names.items()}
    layer.load_state_dict(block | own)
    layer.double().eval()
    places = torch.arange(29)[None]
    embeddings, hidden_states = theirs.model.embed_tokens(tokens[:, 1:]), theirs.model(tokens).last_hidden_state
    told = {"attention_mask": None, "position_ids": places, "past_key_values": None}
    turns = theirs.model.rotary_emb(embeddings, places)
    logits = theirs.lm_head(layer(embeddings, hidden_states[:, :-1], turns, **told))
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 2:].flatten())

    ours = hf_arch.convert(tmp_path, "deepseek", num_nextn_predict_layers=1).double().train()
    losses = [ours(tokens, labels=tokens).loss]
    ours.config.mtp_loss_coef = 0.0
    losses.append(ours(tokens, labels=tokens).loss)
    assert_close((losses[0] - losses[1]) / 0.1, expected, **EXACT)
    assert_close(ours.eval()(tokens, labels=tokens).loss, losses[1], **EXACT)  # not asked at inference
