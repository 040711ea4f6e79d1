"""Checkpoints of H3 (danfu09/H3-125M and its kin): the authors' tensors alone, which tell the sizes but one."""

import re

import torch

from ...skeleton.conversion import Conversion, Fields, Rule, Tensors

ATTENTION_HEADS = {768: 12, 1024: 16, 2048: 16, 2560: 20}  # by width, of those that the authors published
OLD_NAMES = ((r"^s4seq\.encoder\.", "backbone."), (r"^embedding\.", "backbone.embeddings.word_embeddings."))


def named(tensors: Tensors) -> Tensors:
    """By the names of the authors' present code. Their older checkpoints keep a norm with the part before it."""
    found = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("model.")
        for old, new in OLD_NAMES:
            name = re.sub(old, new, name)
        found[name] = tensor
    if "backbone.norm.weight" not in found:
        return found
    layers = 1 + max(int(match[1]) for name in found if (match := re.match(r"backbone\.layers\.(\d+)\.", name)))
    places = [f"backbone.layers.{layer}.norm{part}" for layer in range(layers) for part in (1, 2)]
    moved = dict(zip(["backbone.norm", *places], [*places, "backbone.ln_f"], strict=True))
    return {
        moved.get(name.rpartition(".")[0], name.rpartition(".")[0]) + name[name.rindex(".") :]: x
        for name, x in found.items()
    }


def describe(tensors: Tensors) -> Fields:
    """What a config would say; nothing of other models."""
    found = named(tensors)
    spaces = [name for name in found if name.endswith(".mixer.kernel.kernel.C")]
    if not spaces:
        return {}
    if any("rotary" in name for name in found):
        raise ValueError("The attention of this H3 turns its queries and keys (rotary), which ours does not.")
    vocabulary, size = found["backbone.embeddings.word_embeddings.weight"].shape
    prefix = spaces[0].removesuffix("kernel.kernel.C")
    layers = 1 + max(int(match[1]) for name in found if (match := re.match(r"backbone\.layers\.(\d+)\.", name)))
    attends = [f"backbone.layers.{layer}.mixer.Wqkv.weight" in found for layer in range(layers)]
    return {
        "model_type": "h3",
        "vocab_size": vocabulary,
        "hidden_size": size,
        "intermediate_size": len(found["backbone.layers.0.mlp.fc1.weight"]),
        "num_hidden_layers": layers,
        "layer_types": ["full_attention" if attention else "h3" for attention in attends],
        "state_size": 2 * found[spaces[0]].shape[2],
        "state_head_dim": size // len(found[f"{prefix}D"]),
    }


def h3_config(fields: Fields, num_attention_heads: int | None = None) -> Fields:
    heads = num_attention_heads or ATTENTION_HEADS.get(fields["hidden_size"])
    if heads is None:
        if "full_attention" in fields["layer_types"]:
            raise ValueError("The tensors do not tell how many heads attend: give num_attention_heads.")
        heads = 1
    told = {name: value for name, value in fields.items() if name != "model_type"}
    return told | {
        "num_attention_heads": heads,
        "tie_word_embeddings": True,
        "bos_token_id": 50256,  # of GPT-2's tokenizer
        "eos_token_id": 50256,
    }


def prepare(tensors: Tensors, fields: Fields) -> Tensors:
    """The shift state space of a channel, what goes into its state, what is read from it and its skip, is the
    convolution that it does."""
    left = named(tensors)
    for name in [name for name in left if name.endswith("ssm_k_D")]:
        kernel = f"{name.removesuffix('ssm_k_D')}ssm_k_kernel.kernel."
        skip, into, out = left.pop(name), left.pop(f"{kernel}B"), left.pop(f"{kernel}C").squeeze(0)
        size, dtype = out.shape[1], out.dtype
        skip, into, out = skip.double(), into.double(), out.double()
        taps = torch.stack([(into[:, : size - lag] * out[:, lag:]).sum(-1) for lag in range(size)], dim=1)
        taps[:, 0] += skip
        left[f"{name.removesuffix('ssm_k_D')}shift.weight"] = taps.flip(-1).to(dtype)
    return left


LAYER = (
    (r"mixer\.([qkv]_proj)\.(\w+)", (r"mixer.\2.\3",), None),
    (r"mixer\.(?:output_linear|out_proj)\.(\w+)", (r"mixer.o_proj.\2",), None),
    (
        r"mixer\.Wqkv\.(\w+)",
        tuple(rf"mixer.{name}_proj.\2" for name in "qkv"),
        lambda tensor, config: tensor.chunk(3),
    ),
    (r"mixer\.shift\.weight", (r"mixer.shift.weight",), None),
    (r"mixer\.kernel\.kernel\.log_dt", (r"mixer.state_space.log_step",), None),
    (r"mixer\.kernel\.kernel\.inv_A_real", (r"mixer.state_space.A_log",), None),
    (r"mixer\.kernel\.kernel\.(A_imag|B|C)", (r"mixer.state_space.\2",), None),
    (r"mixer\.D", (r"mixer.state_space.D",), None),
    (r"norm1\.(\w+)", (r"residual.norm.mixer.\2",), None),
    (r"norm2\.(\w+)", (r"residual.norm.feed_forward.\2",), None),
    (r"mlp\.fc1\.(\w+)", (r"feed_forward.up_proj.\2",), None),
    (r"mlp\.fc2\.(\w+)", (r"feed_forward.down_proj.\2",), None),
)

CONVERSIONS = (
    Conversion(
        model_type="h3",
        config=h3_config,
        describe=describe,
        choices=("num_attention_heads",),
        heads={},
        default_head="ForCausalLM",
        prepare=prepare,
        rules=(
            Rule(r"backbone\.embeddings\.word_embeddings\.weight", "model.embed_tokens.weight"),
            Rule(r"backbone\.ln_f\.(\w+)", r"model.norm.\1"),
            Rule(r"lm_head\.weight", "lm_head.weight"),
            *(
                Rule(
                    rf"backbone\.layers\.(\d+)\.{theirs}", *(rf"model.layers.\1.{name}" for name in ours), change=change
                )
                for theirs, ours, change in LAYER
            ),
        ),
    ),
)
