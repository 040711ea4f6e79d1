"""Transformers as the long-context forms that take over their weights: windows with sinks (StreamingLLM: Xiao et al.,
2023, arXiv:2309.17453), Performer (Choromanski et al., 2020, arXiv:2009.14794, section 4.3), retention (Sun et al.,
2023, arXiv:2307.08621) and SSD (Mamba in the Llama: Wang et al., 2024, arXiv:2408.15237, algorithm 1)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_arch.architecture import Architecture
from hf_arch.catalogue import find
from hf_arch.modeling.layers.attention import Attention
from hf_arch.modeling.layers.mixer import Mixer
from hf_arch.modeling.skeleton.config import ArchConfig
from hf_arch.modeling.state_space.hybrid.configuration_hybrid import CONFIGS
from hf_arch.modeling.state_space.hybrid.modeling_hybrid import ArchHybridModel
from hf_arch.modeling.state_space.retnet.modeling_retnet import MultiScaleRetention
from hf_arch.modeling.state_space.ssd.modeling_ssd import SSD
from hf_arch.remake.state import remade
from hf_arch.remake.upcycle import as_ours

HYBRID = find("hybrid")
TEACHERS = ("transformer", "mixtral", "hybrid")  # whose stacks have the parts that a hybrid has
ATTENTION = ("full_attention", "sliding_attention", "sink_attention")  # whose projections can be taken over
OPEN = 1.2784645427610737  # silu of it is 1: a gate with this bias and no weights lets all pass


def joined(linear: nn.Linear) -> torch.Tensor:
    """[out, in + 1]: the weights, and the bias as one more column."""
    bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
    return torch.cat((linear.weight, bias[:, None]), dim=1)


def fill(linear: nn.Linear, weights: torch.Tensor) -> None:
    linear.weight.copy_(weights[:, :-1])
    linear.bias.copy_(weights[:, -1])


def of_all_heads(attention: Attention) -> list[torch.Tensor]:
    """Queries, keys and values [heads * dim, in + 1]; keys and values that heads share are repeated for each."""
    parts = (joined(part).unflatten(0, (-1, attention.head_dim)) for part in projections(attention)[:3])
    heads = attention.q_proj.out_features // attention.head_dim
    return [part.repeat_interleave(heads // len(part), dim=0).flatten(0, 1) for part in parts]


def projections(attention: Attention) -> tuple[nn.Linear, ...]:
    return attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj


def open_gate(values: torch.Tensor) -> torch.Tensor:
    gate = torch.zeros_like(values)
    gate[:, -1] = OPEN
    return gate


def as_they_are(mixer: Attention, attention: Attention) -> None:
    """Every projection means the same."""
    for new, old in zip(projections(mixer), projections(attention), strict=True):
        new.load_state_dict(old.state_dict())


def into_retention(mixer: MultiScaleRetention, attention: Attention) -> None:
    query, key, value = of_all_heads(attention)
    for new, old in ((mixer.q_proj, query), (mixer.k_proj, key), (mixer.v_proj, value)):
        fill(new, old)
    fill(mixer.g_proj, open_gate(value))
    fill(mixer.o_proj, joined(attention.o_proj))


def into_ssd(mixer: SSD, attention: Attention) -> None:
    """Queries read the state (C), keys say where in it values are written (B, x); convolutions begin as nothing, and
    no value skips the state."""
    query, key, value = of_all_heads(attention)
    steps = joined(mixer.in_proj)[-mixer.num_heads :]
    fill(mixer.in_proj, torch.cat((open_gate(value), value, key, query, steps)))
    mixer.convolution.weight.zero_()[:, -1] = 1
    mixer.convolution.bias.zero_()
    mixer.D.zero_()
    fill(mixer.out_proj, joined(attention.o_proj))


@dataclass(frozen=True)
class Form:
    """How attention becomes a mixer of one kind.

    take_over: (new mixer, attention) -> None, fills the one with the weights of the other.
    decided: the options of the mixer that follow from the config of the attention.
    choices: those that are left open.
    """

    take_over: Callable[[Mixer, Attention], None]
    decided: Callable[[ArchConfig], dict] = lambda config: {}
    choices: tuple[str, ...] = ()


def of_heads(config: ArchConfig) -> dict:
    same = ("num_key_value_heads", "head_dim", "attention_scaling")
    return {name: getattr(config, name) for name in same if getattr(config, name, None) is not None} | {
        "feature_redraw_interval": None  # what a mixer is fitted with, it keeps
    }


def of_retention(config: ArchConfig) -> dict:
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(
            f"Heads of retention are hidden_size / num_attention_heads wide, {config.hidden_size} / "
            f"{config.num_attention_heads}, but those of the model are {config.head_dim}: take 'ssd' or 'favor'."
        )
    return {"value_expansion": 1.0, "attention_bias": True}


def of_ssd(config: ArchConfig) -> dict:
    width = config.head_dim * config.num_attention_heads
    groups = {"n_groups": config.num_attention_heads, "state_size": config.head_dim}
    return groups | {"expand": width / config.hidden_size, "attention_bias": True}


STEPS = ("time_step_min", "time_step_max", "time_step_floor", "time_step_limit")
FEATURES = ("kernel_type", "num_features", "feature_redraw_interval", "kernel_epsilon")
FORMS = {
    "full_attention": Form(as_they_are),
    "sliding_attention": Form(as_they_are, choices=("sliding_window",)),
    "sink_attention": Form(as_they_are, choices=("sliding_window", "num_sink_tokens")),
    "favor": Form(as_they_are, of_heads, FEATURES),
    "retention": Form(into_retention, of_retention),
    "ssd": Form(into_ssd, of_ssd, ("conv_kernel", *STEPS)),
}


@torch.no_grad()
def uptrain(model: PreTrainedModel, kind: str, layers: Iterable[int] | None = None, **options) -> PreTrainedModel:
    """A hybrid that has all of `model` but its attention, in whose place there are mixers of another kind:

        student = hf_arch.uptrain(LlamaForCausalLM.from_pretrained(...), "ssd", layers=range(1, 32, 2))
        hf_arch.MixerTrainer(student, arguments, teacher=llama, train_dataset=dataset).train()  # the mixers alone
        student = get_peft_model(student, hf_arch.lora_config(student))  # then adapters of all, with a plain Trainer

    `model` is a causal one of hf_arch whose layers are a Transformer's, or one of transformers' that can become it
    (Llama, GPT-2, Mixtral, ...); it stays as it is. Feed-forwards, norms, embeddings and head are kept to the bit.
    `layers` are those that change, by default all with attention; the others stay. To mix several kinds, call it again
    with what it answered.

    `kind` is a layer type; `options` are what is left open of it:

    - "sink_attention": the last `sliding_window` tokens and the first `num_sink_tokens`. Weights mean what they did:
      a text no longer than the window is answered as before. So are "sliding_attention" and "full_attention".
    - "favor": the attention of a Performer, `num_features` random features that estimate the same weights.
    - "retention": the projections of queries, keys, values and output, with rotary positions, and a memory that fades.
    - "ssd": those of queries, keys and values become what reads the state, what says where it is written, and what is.

    In the last two each head has keys and values of its own, and gates begin open. Raises ValueError for a model that
    is no causal Transformer or has adapters, a kind that is not among these, options that it does not have, layers that
    have no attention, and heads that do not fit.
    """
    model = as_ours(model)
    row, config = check_teacher(model), model.config
    form = check_kind(kind, options)
    chosen = check_layers(config, None if layers is None else list(layers))
    kept = {found for layer, found in enumerate(config.layer_types) if layer not in chosen}
    hybrid = HYBRID.load("Config").from_dict(hybrid_fields(config, kind, chosen, kept, options))
    model_class = HYBRID.load(type(model).__name__.removeprefix(row.prefix))
    with torch.device("meta"):
        empty = model_class(hybrid)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    backbone = "" if model.base_model is model else "model."
    for group in sorted({config.layer_groups[layer] for layer in chosen}):
        name = f"{backbone}layers.{group}.mixer"
        attention = model.get_submodule(name)
        mixer = ArchHybridModel.mixers[kind](hybrid, config.layer_groups.index(group)).apply(empty._init_weights)
        form.take_over(mixer.to(attention.q_proj.weight), attention)
        state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.")}
        state |= {f"{name}.{key}": tensor for key, tensor in mixer.state_dict().items()}
    return remade(model, hybrid, state, model_class)


def hybrid_fields(config: ArchConfig, kind: str, chosen: set[int], kept: set[str], options: dict) -> dict:
    """The config of the hybrid, as it would be saved."""
    types = [kind if layer in chosen else found for layer, found in enumerate(config.layer_types)]
    fields = config.to_dict() | {"mixer_types": types}
    del fields["model_type"]
    if fields["sliding_window"] is None:
        del fields["sliding_window"]  # a hybrid has a default
    before = fields.get("mixer_options") or {}
    if kind not in CONFIGS:
        check_kept(kind, kept & {"sliding_attention", "sink_attention"}, fields, options)
        return fields | options
    told = FORMS[kind].decided(config) | options
    check_kept(kind, kept & {kind}, before.get(kind, {}), told)
    return fields | {"mixer_options": {name: before[name] for name in before if name in types} | {kind: told}}


def check_kept(kind: str, kept: set[str], before: dict, now: dict) -> None:
    """Layers of a type share its options: those that stay cannot get others."""
    if kept and (differing := [name for name in now if now[name] != before.get(name)]):
        name = differing[0]
        raise ValueError(
            f"The model has layers of type {', '.join(sorted(kept))} that stay, with {name} {before.get(name)!r}: it "
            f"cannot be {now[name]!r} in those of type {kind}."
        )


def check_teacher(model: PreTrainedModel) -> Architecture:
    config = model.config
    row = find(config.model_type)
    if row.name not in TEACHERS or getattr(config, "direction", "causal") != "causal":
        direction = getattr(config, "direction", "")
        raise ValueError(
            f"A {f'{direction} ' if direction else ''}{row.name} cannot be uptrained: that takes the attention of a "
            f"causal decoder, one of {', '.join(TEACHERS)}, or of what hf_arch.convert makes into one (Llama, GPT-2)."
        )
    return row


def check_kind(kind: str, options: dict) -> Form:
    if kind not in FORMS:
        raise ValueError(f"Attention cannot become {kind!r}; it can become {', '.join(FORMS)}.")
    if unknown := [name for name in options if name not in FORMS[kind].choices]:
        known = ", ".join(FORMS[kind].choices) or "nothing"
        raise ValueError(f"{unknown[0]} cannot be chosen for {kind!r}, which leaves {known} open.")
    return FORMS[kind]


def check_layers(config: ArchConfig, layers: list[int] | None) -> set[int]:
    """Those of `layers`, by default all that attend."""
    types = config.layer_types
    attending = {layer for layer, found in enumerate(types) if found in ATTENTION}
    chosen = attending if layers is None else set(layers)
    if not chosen:
        raise ValueError("No layer is to change: layers is empty, or none has attention.")
    if wrong := sorted(chosen - set(range(len(types)))):
        raise ValueError(f"layers names {wrong[0]}, but there are 0 to {len(types) - 1}.")
    if wrong := sorted(chosen - attending):
        raise ValueError(f"Layer {wrong[0]} is of type {types[wrong[0]]}: what can change is {', '.join(ATTENTION)}.")
    return chosen
