"""Checkpoints of H-Net in the authors' layout (cartesia-ai/hnet_1stage_L): a .pt file alone, or beside their config as
config.json (configs/hnet_1stage_L.json of github.com/goombalab/hnet). Tokens are bytes: `hf_arch.byte_tokenizer()`.

A file alone tells the layers and their widths, but not how attention is cut into heads: it is then taken to be as in
all that the authors published, 16 heads, half of each turned by positions, and windows in all levels but the last.
"""

import re

import torch

from ...skeleton.conversion import Conversion, Fields, Rule, Tensors, refuse, require

HEADS, WINDOW = 16, 1023
MULTIPLE = 128  # widths inside feed-forwards are rounded up to
MIXERS = {"m": "ssd", "t": "ragged_attention"}
ROUTING = "routing_module.q_proj_layer.weight"
STAGE = r"backbone(?P<stages>(?:\.main_network)*)"
PART = rf"{STAGE}\.(?P<part>encoder|main_network|decoder)"
NOWHERE = "model.nowhere"
LAYERS = re.compile(r"([mMtT])(\d+)")


def layouts(arch_layout: list) -> list[str]:
    """Of the parts in order: `["m4", ["T22"], "m4"]` -> `["m4", "T22", "m4"]`."""
    if len(arch_layout) == 1:
        return arch_layout
    before, inner, after = arch_layout
    return [before, *layouts(inner), after]


def told_by_layout(parts: list[str], windows: list[int]) -> Fields:
    """A capital letter is a layer with a feed-forward."""
    top, found = len(parts) // 2, {"layer_types": [], "feed_forward_types": [], "layer_levels": []}
    for part, layout in enumerate(parts):
        level = min(part, 2 * top - part)
        for letter, count in LAYERS.findall(layout):
            kind = MIXERS[letter.lower()]
            if kind == "ragged_attention" and windows[level] >= 0:
                kind = "causal_window_attention"
            found["layer_types"] += [kind] * int(count)
            found["feed_forward_types"] += ["gated" if letter.isupper() else "none"] * int(count)
            found["layer_levels"] += [level] * int(count)
    return found | {"num_hidden_layers": len(found["layer_types"])}


def authors_config(fields: Fields) -> Fields:
    sizes, attention, layer = fields["d_model"], fields["attn_cfg"], fields.get("ssm_cfg", {})
    (heads,) = one_of("num_heads", attention["num_heads"])
    windows = attention["window_size"]
    window = one_of("window_size", [w for w in windows if w >= 0])
    shares = [dim * heads / size for dim, size in zip(attention["rotary_emb_dim"], sizes, strict=True)]
    (share,) = one_of("rotary_emb_dim of a head", shares)
    require(attention, qkv_proj_bias=False, out_proj_bias=False, rotary_emb_base=10000.0, rotary_emb_interleaved=False)
    widths = [width or 4 * size for width, size in zip(fields["d_intermediate"], sizes, strict=True)]  # 0: not in use
    inside = [-(-width // MULTIPLE) * MULTIPLE for width in widths]
    return (
        told_by_layout(layouts(fields["arch_layout"]), windows)
        | {
            "vocab_size": fields.get("vocab_size", 256),
            "hidden_size": sizes[0],
            "inner_hidden_sizes": sizes[1:],
            "intermediate_size": inside[0] or inside[1],  # where no layer of the first level feeds forward, it says 0
            "inner_intermediate_sizes": inside[1:],
            "num_attention_heads": heads,
            "rotary_share": share,
            "sliding_window": window[0] + 1 if window else None,
            "state_size": layer.get("d_state", 128),
            "conv_kernel": layer.get("d_conv", 4),
            "expand": layer.get("expand", 2),
            "tie_word_embeddings": fields.get("tie_embeddings", False),
        }
    )


def one_of(name: str, values: list) -> list:
    """The values without repetitions, if there is at most one."""
    found = sorted(set(values))
    if len(found) > 1:
        raise ValueError(f"{name} differs from level to level ({values}); only models with one can be converted.")
    return found


def authors_fields(tensors: Tensors) -> Fields:
    """What a config would say, if these are tensors of an H-Net."""
    if f"backbone.{ROUTING}" not in tensors:
        return {}
    stages = ["backbone"]
    while f"{stages[-1]}.{ROUTING}" in tensors:
        stages.append(f"{stages[-1]}.main_network")
    top, names = len(stages) - 1, [f"{stage}.encoder" for stage in stages[:-1]]
    names += [f"{stages[-1]}.main_network", *(f"{stage}.decoder" for stage in reversed(stages[:-1]))]
    parts = [layout_of(tensors, name) for name in names]
    layout, inside = [parts[top]], [0] * len(stages)
    for level in reversed(range(top)):
        layout = [parts[level], layout, parts[2 * top - level]]
    for part, name in enumerate(names):
        inner = re.compile(rf"{name}\.layers\.\d+\.mlp\.fc2\.weight")
        widths = [tensor.shape[1] for key, tensor in tensors.items() if inner.fullmatch(key)]
        inside[min(part, 2 * top - part)] = max(widths, default=0)
    sizes = [len(tensors[f"{name}.rmsnorm.weight"]) for name in names[: top + 1]]
    embeddings = tensors["embeddings.weight"]
    return {
        "model_type": "H-Net",
        "arch_layout": layout,
        "d_model": sizes,
        "d_intermediate": inside,
        "vocab_size": len(embeddings),
        "ssm_cfg": recurrence_of(tensors),
        "attn_cfg": {
            "num_heads": [HEADS] * len(sizes),
            "rotary_emb_dim": [size // HEADS // 2 for size in sizes],
            "window_size": [WINDOW] * top + [-1],
        },
        "tie_embeddings": torch.equal(embeddings, tensors.get("lm_head.weight", embeddings)),
    }


def layout_of(tensors: Tensors, part: str) -> str:
    """Such as "T1m1m1", of the layers that are there."""
    layout, layer = "", f"{part}.layers.0"
    while f"{layer}.norm1.weight" in tensors:
        letter = "t" if f"{layer}.mixer.Wqkv.weight" in tensors else "m"
        layout += (letter.upper() if f"{layer}.mlp.fc1.weight" in tensors else letter) + "1"
        layer = f"{part}.layers.{len(layout) // 2}"
    return layout


def recurrence_of(tensors: Tensors) -> Fields:
    """The sizes of the first Mamba-2 layer."""
    name = next((name for name in tensors if name.endswith(".mixer.conv1d.weight")), None)
    if name is None:
        return {}
    size, inner = tensors[name.replace("conv1d", "out_proj")].shape
    channels, _, taps = tensors[name].shape
    return {"d_conv": taps, "expand": inner // size, "d_state": (channels - inner) // 2}


def place_of(match: re.Match, config) -> str:
    """Our name of a layer or norm of theirs: `backbone.main_network.encoder.layers.3` -> `model.layers.7`."""
    top, depth = config.num_levels - 1, match["stages"].count("main_network")
    if depth > top or (depth == top) != (match["part"] == "main_network"):
        return NOWHERE
    part = {"encoder": depth, "main_network": top, "decoder": 2 * top - depth}[match["part"]]
    if "layer" in match.re.groupindex:
        layers = config.parts[part]
        number = int(match["layer"])
        return f"model.layers.{layers[number]}" if number < len(layers) else NOWHERE
    return f"model.part_norms.{part}" if part < 2 * top else "model.norm"


def in_layer(theirs: str, *ours: str, change=None) -> Rule:
    """A rule of what layers have; `ours` may use the groups of `theirs`."""
    targets = [lambda match, config, name=name: [f"{place_of(match, config)}.{match.expand(name)}"] for name in ours]
    return Rule(rf"{PART}\.layers\.(?P<layer>\d+)\.{theirs}", *targets, change=change)


def output_projection(match: re.Match, config) -> list[str]:
    """Theirs has one name for that of attention and that of a recurrence."""
    place = place_of(match, config)
    attends = place != NOWHERE and config.layer_types[int(place.rpartition(".")[2])] != "ssd"
    return [f"{place}.mixer.{'o_proj' if attends else 'out_proj'}.weight"]


def in_stage(theirs: str, ours: str, above: int = 0) -> Rule:
    """Of what is between a stage and the next; `above`: 1 where it is written with the latter."""

    def target(match: re.Match, config) -> list[str]:
        return [f"model.resamplings.{match['stages'].count('main_network') - above}.{match.expand(ours)}"]

    return Rule(rf"{STAGE}\.{theirs}", target)


RULES = (
    Rule(r"embeddings\.weight", "model.embed_tokens.weight"),
    Rule(r"lm_head\.weight", "lm_head.weight"),
    Rule(rf"{PART}\.rmsnorm\.weight", lambda match, config: [f"{place_of(match, config)}.weight"]),
    in_layer(r"norm1\.weight", "residual.norm.mixer.weight"),
    in_layer(r"norm2\.weight", "residual.norm.feed_forward.weight"),
    in_layer(
        r"mixer\.Wqkv\.weight",
        *(f"mixer.{name}_proj.weight" for name in "qkv"),
        change=lambda weight, config: weight.chunk(3),
    ),
    in_layer(
        r"mlp\.fc1\.weight",
        "feed_forward.up_proj.weight",
        "feed_forward.gate_proj.weight",
        change=lambda weight, config: weight.chunk(2),
    ),
    in_layer(r"mlp\.fc2\.weight", "feed_forward.down_proj.weight"),
    in_layer(r"mixer\.conv1d\.weight", "mixer.convolution.weight", change=lambda weight, config: weight.squeeze(1)),
    in_layer(r"mixer\.conv1d\.bias", "mixer.convolution.bias"),
    in_layer(r"mixer\.(?P<name>in_proj\.weight|dt_bias|A_log|D|norm\.weight)", r"mixer.\g<name>"),
    Rule(rf"{PART}\.layers\.(?P<layer>\d+)\.mixer\.out_proj\.weight", output_projection),
    in_stage(r"routing_module\.(?P<name>[qk]_proj)_layer\.weight", r"\g<name>.weight"),
    in_stage(r"residual_proj\.(?P<name>weight|bias)", r"residual_proj.\g<name>"),
    in_stage(r"pad_dimension", "pad_dimension", above=1),
)

CONVERSIONS = (
    Conversion(
        model_type="H-Net",
        mark="arch_layout",
        config=authors_config,
        heads={"HNetForCausalLM": "ForCausalLM"},
        default_head="ForCausalLM",
        describe=authors_fields,
        original=refuse("the authors' code runs on a GPU alone."),
        rules=RULES,
    ),
)
