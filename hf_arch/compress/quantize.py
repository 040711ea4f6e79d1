"""Weights of eight or four bits, for every row of the catalogue."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from hf_arch.compress.needs import need
from hf_arch.modeling.layers.derived import Derived
from hf_arch.modeling.layers.experts import SeparateExperts, SideBySide
from hf_arch.modeling.skeleton.backbone import Layer
from hf_arch.modeling.skeleton.config import ArchConfig
from hf_arch.remake.state import changed, refuse_adapters, remade

if TYPE_CHECKING:
    from transformers.utils.quantization_config import QuantizationConfigMixin

GROUP = 64  # numbers of a row that share a scale, of four bits
ROWS = 16  # of a matrix, that a kernel of int4 takes at once


@torch.no_grad()
def quantize(model: PreTrainedModel, kind: str = "int8") -> PreTrainedModel:
    """`model` with the matrices inside its layers in few bits, that of experts too; it stays as it is itself. Example:

        small = hf_arch.compress.quantize(model, "nf4")
        small = get_peft_model(small, hf_arch.lora_config(small, r=8))  # trains adapters alone

    | kind | by | a CPU | LoRA on top | save_pretrained |
    |---|---|---|---|---|
    | "int8" | torchao: a scale for each row | yes | yes | yes |
    | "int4" | torchao: a scale and a zero for 64 numbers of a row | yes | no gradient | on a GPU |
    | "nf4" | bitsandbytes (QLoRA, arXiv:2305.14314): 64 numbers of a row | yes | yes | yes |

    A saved model loads by `from_pretrained`, to the same answers. What stays in full precision is what
    `full_precision(model)` names: embeddings, heads and whatever else is outside of layers; routers, and others that
    decide which tokens or experts are taken; what sets the memory of a state space; matrices that are read rather than
    multiplied by, such as those that make filters; norms, biases and convolutions; and of "int4" matrices whose sizes
    are no multiples of 64 numbers and 16 rows. Experts become modules (`config.separate_experts`).

    int4 wants a model in bfloat16: a GPU takes no other, and in float32 a CPU is some seventy times slower. The form
    for CPUs is a prototype of torchao's, which its files do not know: keep the checkpoint, and quantise after loading.
    On a CPU few bits save memory, not time.

    Raises ValueError for a model that is not of hf_arch, has adapters or is quantised, and for an unknown kind;
    ImportError where the library of the kind is not installed.
    """
    if not isinstance(model.config, ArchConfig):
        raise ValueError(f"A {type(model).__name__} is not of hf_arch: load it with transformers' quantization_config.")
    if getattr(model, "is_quantized", False):
        raise ValueError("The model is quantised already: begin with that in full precision.")
    refuse_adapters(model)
    check_kind(kind)
    config, state = apart(model)
    with torch.device("meta"):
        empty = type(model)(config)
    how = KINDS[kind](full_precision(empty, kind), model)
    return remade(model, config, state, quantization_config=how)


def quantization_config(model: PreTrainedModel, kind: str = "int8") -> "QuantizationConfigMixin":
    """What `from_pretrained(..., quantization_config=)` takes to load a checkpoint in few bits, one matrix after
    another. `model` is one of its config, and of its device and dtype, which int4 asks for. Stacked experts stay as
    they are: those of a checkpoint become modules by `quantize` alone. Raises as `quantize`."""
    check_kind(kind)
    return KINDS[kind](full_precision(model, kind), model)


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; there are {', '.join(KINDS)}.")


def full_precision(model: nn.Module, kind: str = "int8") -> list[str]:
    """The names of the Linears of a model that quantisation leaves as they are."""
    quantised = set(quantised_linears(model, kind))
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in quantised]


def quantised_linears(model: nn.Module, kind: str) -> Iterator[str]:
    kept = {id(module) for module in kept_modules(model)}
    for layer_name, layer in model.named_modules():
        if isinstance(layer, Layer):
            for name, module in layer.named_modules(prefix=layer_name):
                if type(module) is nn.Linear and id(module) not in kept and fits(module, kind):
                    yield name


def kept_modules(model: nn.Module) -> Iterator[nn.Module]:
    """All modules whose matrices do more than answer."""
    for module in model.modules():
        if isinstance(module, Derived):
            yield from module.modules()
        for name in getattr(module, "unquantized", ()):
            yield from getattr(module, name, nn.Identity()).modules()
        for name in getattr(module, "state_parameters", ()):
            yield module.get_submodule(name.rpartition(".")[0])


def fits(linear: nn.Linear, kind: str) -> bool:
    return kind != "int4" or not (linear.in_features % GROUP or linear.out_features % ROWS)


def apart(model: PreTrainedModel) -> tuple[ArchConfig, dict[str, torch.Tensor]]:
    """A copy of the config, and the state, where each expert is a module."""
    separate = {"separate_experts": True} if model.config.has_experts else {}
    config, state = changed(model.config, separate), dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, SideBySide):
            for stacked in (module.first_name, "down_proj"):
                del state[f"{name}.{stacked}"]
            state |= {f"{name}.{part}": matrix for part, matrix in SeparateExperts.apart(module).items()}
    return config, {name: tensor.clone() for name, tensor in state.items()}


def int8(skipped: list[str], model: PreTrainedModel) -> "QuantizationConfigMixin":
    need("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return by_torchao(Int8WeightOnlyConfig(), skipped)


def int4(skipped: list[str], model: PreTrainedModel) -> "QuantizationConfigMixin":
    need("torchao")
    if model.device.type == "cpu":
        from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

        return by_torchao(PrototypeInt4WeightOnlyConfig(group_size=GROUP), skipped)
    from torchao.quantization import Int4WeightOnlyConfig

    if model.dtype != torch.bfloat16:
        raise ValueError(
            f"int4 on a GPU computes in bfloat16, but the model is {model.dtype}: model.to(torch.bfloat16)."
        )
    return by_torchao(Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d"), skipped)


def by_torchao(how, skipped: list[str]) -> "QuantizationConfigMixin":
    from transformers import TorchAoConfig

    return TorchAoConfig(how, modules_to_not_convert=skipped)


def nf4(skipped: list[str], model: PreTrainedModel) -> BitsAndBytesConfig:
    need("bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=model.dtype,
        llm_int8_skip_modules=skipped,
    )


KINDS = {"int8": int8, "int4": int4, "nf4": nf4}
