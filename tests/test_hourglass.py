"""Hourglass answers as lucidrains' hourglass-transformer-pytorch does, and its inner layers cost what they should.

The golden answers are of `HourglassTransformerLM` 0.0.6 in float64 (`goldens/make_hourglass_lucidrains.py`).
"""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from hf_arch import find
from promises import EXACT, Case, some_tokens
from variants import VARIANTS

GOLDEN = Path(__file__).parent / "goldens" / "hourglass_lucidrains.safetensors"
ROW = find("hourglass")
INNER = "valley_transformer"


def attention(theirs: dict, to: str, projections: str = "qkv") -> dict:
    """One of theirs in our names: keys and values are one map there, and only its last map has a bias."""
    key, value = theirs["to_kv.weight"].chunk(2)
    found = {
        f"{to}.{which}_proj.weight": x for which, x in zip("qkv", (theirs["to_q.weight"], key, value), strict=True)
    }
    found |= {f"{to}.{which}_proj.bias": torch.zeros(len(key)) for which in "qkv"}
    found = {name: x for name, x in found.items() if name.removeprefix(f"{to}.")[0] in projections}
    return found | {f"{to}.o_proj.{end}": theirs[f"to_out.{end}"] for end in ("weight", "bias")}


def renamed(theirs: dict, **names: str) -> dict:
    return {f"{to}.{end}": theirs[f"{name}.{end}"] for name, to in names.items() for end in ("weight", "bias")}


def under(prefix: str, tensors: dict) -> dict:
    return {name.removeprefix(f"{prefix}."): x for name, x in tensors.items() if name.startswith(f"{prefix}.")}


def layer(theirs: dict, number: int) -> dict:
    to = f"layers.{number}"
    found = attention(under("0.fn", theirs), f"{to}.mixer")
    found |= renamed(under("1.fn", theirs), **{"0": f"{to}.feed_forward.up_proj", "3": f"{to}.feed_forward.down_proj"})
    norms = {"0.norm": f"{to}.residual.norm.mixer", "1.norm": f"{to}.residual.norm.feed_forward"}
    return found | renamed(theirs, **norms)


def resampling(theirs: dict, stage: int) -> dict:
    """What tokens ask of the only item that they see does not matter: ours has neither its query, nor key, nor norm."""
    to, found = f"resamplings.{stage}", {}
    for way, name in (("down", "attn_resampling_pre_valley"), ("up", "attn_resampling_post_valley")):
        if not (block := under(f"{name}.layers.0", theirs)):
            continue
        dense = {"0": f"{to}.{way}_feed_forward.up_proj", "3": f"{to}.{way}_feed_forward.down_proj"}
        found |= renamed(under("1.fn", block), **dense)
        norms = {"1.norm": f"{to}.{way}.norm.feed_forward"} | {"0.norm": f"{to}.{way}.norm.attention"}
        found |= renamed(block, **dict(list(norms.items())[: 2 if way == "down" else 1]))
        found |= attention(under("0.fn", block), f"{to}.{way}_attention", "qkv" if way == "down" else "v")
    if "downsample.proj.weight" in theirs:
        found |= renamed(
            theirs, **{"downsample.proj": f"{to}.pool.shorten_proj", "upsample.proj": f"{to}.pool.expand_proj"}
        )
    return found


def translated(theirs: dict) -> tuple[dict, list[int]]:
    """Their weights in our names, and the levels of the layers."""
    found = {"embed_tokens.weight": theirs["token_emb.weight"]}
    found |= {"embed_positions.embed_positions.weight": theirs["pos_emb.weight"]}
    stages, here = [], under("transformer", theirs)
    found |= renamed(here, norm_out="norm")
    while any(name.startswith(INNER) for name in here):
        stages.append(here)
        here = under(INNER, here)
    parts = [under("pre_transformer.layers", stage) for stage in stages] + [under("layers", here)]
    parts += [under("post_transformer.layers", stage) for stage in reversed(stages)]
    levels = [*range(len(stages) + 1), *reversed(range(len(stages)))]
    of_layers, number = [], 0
    for part, level in zip(parts, levels, strict=True):
        for i in sorted({int(name.split(".")[0]) for name in part}):
            found |= layer(under(str(i), part), number)
            of_layers, number = [*of_layers, level], number + 1
    for stage, tensors in enumerate(stages):
        found |= resampling(tensors, stage)
    return found, of_layers


@pytest.mark.parametrize("name", ["linear", "nested", "plain", "encoder"])
@torch.no_grad()
def test_equals_lucidrains(name):
    with safe_open(GOLDEN, "pt") as file:
        fields = json.loads(file.metadata()["configs"])[name]
    golden = under(name, load_file(GOLDEN))
    weights, levels = translated(under("weights", golden))
    factors = fields["shorten_factor"]
    model = ROW.load("Model")(
        ROW.load("Config")(
            vocab_size=fields["num_tokens"],
            hidden_size=fields["dim"],
            intermediate_size=4 * fields["dim"],
            num_hidden_layers=len(levels),
            num_attention_heads=fields["heads"],
            head_dim=fields["dim_head"],
            layer_levels=levels,
            shorten_factors=factors if isinstance(factors, list) else [factors],
            resampling_type={"naive": "average", "linear": "linear"}[fields.get("updown_sample_type", "naive")],
            attention_resampling=fields.get("attn_resampling", True),
            direction="causal" if fields.get("causal", True) else "bidirectional",
            max_position_embeddings=fields["max_seq_len"],
            position_type="learned",
            attention_bias=True,
        )
    )
    model.load_state_dict(weights)
    assert_close(model.double()(golden["ids"]).last_hidden_state, golden["answers"], **EXACT)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"shorten_factors": [1]}, "a group has at least two items"),
        ({"shorten_factors": []}, "shortens nothing is a Transformer"),
        ({"layer_levels": [0, 1]}, "layer_levels has 2 entries for 3 layers"),
        ({"layer_levels": [1, 0, 1]}, "rise to the last level, and fall back"),
        ({"layer_levels": [0, 0, 0]}, "No layer works at level 1"),
        ({"layer_levels": [0, 2, 0]}, "has the levels 0 to 1"),
        ({"direction": "bidirectional", "layer_types": ["ragged_attention"] * 3}, "has layers of type bidirectional"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        ROW.tiny_config(**fields)


def test_the_default_is_the_papers_hierarchy():
    config = ROW.load("Config")
    assert config().layer_levels == [0] * 2 + [1] * 8 + [0] * 2  # 2@1 8@3 2@1
    nested = config(shorten_factors=[2, 3], num_hidden_layers=8)
    assert nested.layer_levels == [0, 1, 2, 2, 2, 2, 1, 0]
    assert nested.parts == [range(1), range(1, 2), range(2, 6), range(6, 7), range(7, 8)]


@torch.no_grad()
def test_the_short_middle_runs_only_when_a_group_is_complete():
    model = Case(ROW, "ForCausalLM").build(shorten_factors=[2, 3], num_hidden_layers=5)
    tokens, runs = some_tokens(1, 40), {2: [], 1: [], 0: []}
    for level, layer_idx in ((0, 0), (1, 1), (2, 2)):
        model.model.layers[layer_idx].register_forward_hook(lambda *told, level=level: runs[level].append(place))
    place, cache = 0, None
    for place in range(40):
        cache = model(tokens[:, place : place + 1], past_key_values=cache, use_cache=True).past_key_values
    assert runs == {level: [*range(0, 40, factor)] for level, factor in ((0, 1), (1, 2), (2, 6))}


@pytest.mark.parametrize("variant", ["", *VARIANTS["hourglass"]])
@torch.no_grad()
def test_no_number_of_the_past_changes_with_the_future(variant):
    model = Case(ROW, "ForCausalLM", variant, VARIANTS["hourglass"].get(variant, {})).build()
    tokens = some_tokens()
    changed = tokens.clone()
    changed[:, 40:] = (changed[:, 40:] + 7) % 96
    assert torch.equal(model(changed).logits[:, :40], model(tokens).logits[:, :40])


@torch.no_grad()
def test_a_layer_over_groups_costs_what_their_number_says():
    def operations(levels: list[int]) -> int:
        model = Case(ROW, "Model").build(torch.float32, num_hidden_layers=len(levels), layer_levels=levels)
        with FlopCounterMode(display=False) as counter:
            model(some_tokens(1, 72), use_cache=False)
        return counter.get_total_flops()

    of_tokens = operations([0, 0, 1]) - operations([0, 1])
    of_groups = operations([0, 1, 1]) - operations([0, 1])
    assert 0 < 3 * of_groups <= of_tokens
