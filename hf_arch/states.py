"""What a model has read, as a file: a long text is read once, and answered from many times.

A file is safetensors: the tensors of every layer of the cache, samples of the weights that made them, and in its
metadata the config, what kind of cache it was and a checksum. It is written beside its target and moves there when it
is whole.
"""

import copy
import inspect
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
)

from hf_arch.modeling.layers.cache import GrowingCacheLayer
from hf_arch.publish import staged_file

FORMAT, VERSION = "hf_arch.state", 1
SAMPLES = 16  # numbers of each weight that tell whether a state is of this model
HOW_USED = {"use_cache", "initializer_range", "hidden_dropout", "attention_dropout"}  # fields that leave states alone


def save_state(past_key_values: Cache, path: str | Path, model: PreTrainedModel) -> None:
    """Write what `model` has read, its cache, to the file `path`, at once or not at all. Example:

        cache = model(tokens, use_cache=True).past_key_values
        hf_arch.save_state(cache, "book.state", model)

    Raises ValueError for an empty cache, TypeError for one of a kind that cannot be kept (quantized, offloaded).
    """
    if past_key_values is None or not int(past_key_values.get_seq_length()):
        raise ValueError("There is nothing to save: past_key_values is empty. Read a text first, with use_cache=True.")
    tensors, description = pack(past_key_values)
    tensors |= {f"weights.{name}": sample for name, sample in samples(model).items()}
    about = {
        "model_type": model.config.model_type,
        "config": fields_of(model.config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "length": int(past_key_values.get_seq_length()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "cache": description,
    }
    write(path, tensors, about)


def load_state(
    path: str | Path,
    model: PreTrainedModel,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Cache:
    """The cache that `save_state` wrote, to be handed to `model` as `past_key_values`. Example:

        cache = hf_arch.load_state("book.state", model)
        model.generate(text_and_question, past_key_values=hf_arch.fork(cache))

    `device` and `dtype` are those of the model by default; recurrent states stay float32 at least. Raises ValueError
    where the file is of another model, config or weights, or of a newer format, and OSError where it is damaged.
    """
    tensors, about = read(path)
    kept = {name: tensors.pop(name) for name in list(tensors) if name.startswith("weights.")}
    check_same_model(path, model, about, {name.removeprefix("weights."): sample for name, sample in kept.items()})
    saved, wanted = getattr(torch, about["dtype"]), dtype or model.dtype
    if saved != wanted:
        tensors = {name: fitted(name, tensor, wanted) for name, tensor in tensors.items()}
    device = device or model.device
    return unpack({name: tensor.to(device) for name, tensor in tensors.items()}, about["cache"])


def fork(past_key_values: Cache, answers: int = 1) -> Cache:
    """A copy of a cache, each row `answers` times in turn; the cache itself stays as it is, whatever follows the copy.

    It is a snapshot to return to, and the start of several answers to one text.
    """
    if answers > 1 and past_key_values.is_compileable:
        raise ValueError("A static cache has a fixed number of rows: fork a dynamic one, or give answers=1.")
    copied = copy.deepcopy(past_key_values)
    if answers > 1:
        copied.batch_repeat_interleave(answers)
    return copied


def state_bytes(past_key_values: Cache) -> int:
    """How many bytes the tensors of a cache hold: what is resident of a text, as far as it was read."""
    held = []
    for plain in parts_of(past_key_values).values():
        for layer in plain.layers:
            held += [*vars(layer).values(), *getattr(layer, "states", {}).values()]
    return sum(tensor.nbytes for tensor in held if isinstance(tensor, torch.Tensor))


def parts_of(cache: Cache) -> dict[str, Cache]:
    """The plain caches that a cache is made of, by name."""
    if isinstance(cache, EncoderDecoderCache):
        return {"self": cache.self_attention_cache, "cross": cache.cross_attention_cache}
    return {"self": cache}


def pack(cache: Cache) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, what else it takes to build the cache again, as JSON)."""
    tensors: dict[str, torch.Tensor] = {}
    description: dict[str, list] = {}
    for part, plain in parts_of(cache).items():
        if plain.__dict__.get("offloading"):
            raise TypeError("An offloaded cache cannot be kept: read the text with a dynamic or a static one.")
        description[part] = []
        for layer_idx, layer in enumerate(plain.layers):
            held, told = pack_layer(layer)
            tensors |= {f"{part}.{layer_idx}.{name}": tensor for name, tensor in held.items()}
            description[part].append(told)
    return tensors, description


def pack_layer(layer) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, {kind, arguments of its class, plain attributes}) of one layer of a cache, whatever its class."""
    if layer_kinds().get(type(layer).__name__) is not type(layer):
        raise TypeError(f"A cache with a {type(layer).__name__} cannot be kept. Take a DynamicCache or a StaticCache.")
    nested = {name for name, value in vars(layer).items() if isinstance(value, dict | list)} - {
        "states",
        "past",
        "rooms",
    }
    if nested:
        raise TypeError(
            f"A {type(layer).__name__} holds {', '.join(sorted(nested))}, of which a file would know nothing."
        )
    held = {name: value for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}
    for derived in ("front", "_sliding_window_tensor"):
        held.pop(derived, None)
    held |= {f"states.{name}": state for name, state in getattr(layer, "states", {}).items()}
    plain = {name: value for name, value in vars(layer).items() if isinstance(value, bool | int | float | str)}
    plain.pop("record_past", None)
    return held, {"kind": type(layer).__name__, "arguments": arguments_of(layer), "plain": plain}


def arguments_of(layer) -> dict:
    """What the class of a layer of a cache asks for when it is made."""
    asked = inspect.signature(type(layer).__init__).parameters
    given = {name: value for name, value in vars(layer).items() if name in asked}
    if "sliding_window" in asked:  # a static window keeps only the smaller of the two
        given.setdefault("sliding_window", given.get("max_cache_len"))
    return given


def layer_kinds() -> dict[str, type]:
    """The classes of layers that a cache may have: those that some layer type names, and ours for growing keys."""
    kinds = [GrowingCacheLayer, *DYNAMIC_LAYER_TYPE_MAPPING.values(), *STATIC_LAYER_TYPE_MAPPING.values()]
    return {kind.__name__: kind for kind in kinds}


def unpack(tensors: dict[str, torch.Tensor], description: dict) -> Cache:
    """The inverse of `pack`."""
    parts = []
    for part, layers in description.items():
        made = [unpack_layer(dict(under(f"{part}.{i}.", tensors)), told) for i, told in enumerate(layers)]
        static = bool(made) and all(layer.is_compileable for layer in made)
        kind = StaticCache if static else DynamicCache
        parts.append(kind.__new__(kind))  # their own constructors ask for a config and make empty layers
        Cache.__init__(parts[-1], layers=made)
    return parts[0] if len(parts) == 1 else EncoderDecoderCache(*parts)


def unpack_layer(tensors: dict[str, torch.Tensor], told: dict):
    layer = layer_kinds()[told["kind"]](**told["arguments"])
    vars(layer).update(told["plain"])
    states = dict(under("states.", tensors))
    if states:
        layer.states = states
    vars(layer).update({name: tensor for name, tensor in tensors.items() if not name.startswith("states.")})
    if getattr(layer, "keys", None) is not None:
        layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
    if layer.is_compileable:
        for tensor in tensors.values():
            torch._dynamo.mark_static_address(tensor)
    return layer


def under(prefix: str, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name.removeprefix(prefix), tensor) for name, tensor in tensors.items() if name.startswith(prefix))


def fitted(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of a cache for a model of `dtype`."""
    if not tensor.is_floating_point():
        return tensor
    wide = ".states." in name and tensor.element_size() >= 4
    return tensor.to(torch.promote_types(dtype, torch.float32) if wide else dtype)


def fields_of(config: PreTrainedConfig) -> dict:
    """The fields of a config that say what the model computes, as JSON has them."""
    common = PreTrainedConfig().to_dict().keys() | HOW_USED
    fields = {name: value for name, value in config.to_dict().items() if name not in common}
    return json.loads(json.dumps(fields, sort_keys=True))


@torch.no_grad()
def samples(model: nn.Module) -> dict[str, torch.Tensor]:
    """A few numbers of every weight, [SAMPLES or less] in float32."""
    found = {}
    for name, weight in model.named_parameters():
        places = torch.linspace(0, weight.numel() - 1, SAMPLES, device=weight.device).long().unique()
        found[name] = weight.flatten()[places].float().cpu()
    return found


def check_same_model(path, model: PreTrainedModel, about: dict, kept: dict[str, torch.Tensor]) -> None:
    of = about.get("model_type", "training run")
    if of != model.config.model_type:
        raise ValueError(f"{path} is a state of a {of}, not of a {model.config.model_type}.")
    fields = fields_of(model.config)
    other = [name for name in sorted(fields | about["config"]) if fields.get(name) != about["config"].get(name)]
    if other:
        differ = ", ".join(f"{name} {about['config'].get(name)!r}, not {fields.get(name)!r}" for name in other)
        raise ValueError(f"{path} is a state of another config: {differ}. Load the model that read the text.")
    found = samples(model)
    tolerance = 0.0
    if (saved := getattr(torch, about["dtype"])) != model.dtype:  # the same weights, rounded
        tolerance = max(torch.finfo(saved).eps, torch.finfo(model.dtype).eps)
    same = found.keys() == kept.keys() and all(
        torch.allclose(found[name], kept[name], rtol=tolerance, atol=tolerance * 1e-2) for name in found
    )
    if not same:
        raise ValueError(
            f"{path} is a state of other weights: the model was trained on, or has or lacks an adapter. Load the model "
            "that read the text, or read it again."
        )


def write(path: str | Path, tensors: dict[str, torch.Tensor], about: dict) -> None:
    """Tensors and what else is to be known, as JSON, into a file that is there as a whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "version": str(VERSION), "about": json.dumps(about), "checksum": checksum(tensors)}
    with staged_file(path) as stage:
        save_file(tensors, stage, metadata)


def read(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The inverse of `write`. Raises FileNotFoundError, OSError for a damaged file, ValueError for one of another or a
    newer format."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, a safe_open is no dict
    except SafetensorError as error:
        raise OSError(f"{path} is damaged or no state ({error}). Read the text again and save its state.") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is no state that hf_arch.save_state wrote.")
    if int(metadata["version"]) > VERSION:
        raise ValueError(
            f"{path} is a state of format {metadata['version']}, and this hf_arch knows {VERSION}: install a newer one."
        )
    if metadata["checksum"] != checksum(tensors):
        raise OSError(f"{path} is damaged: its checksum is another. Read the text again and save its state.")
    return tensors, json.loads(metadata["about"])


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy(), zlib.crc32(name.encode(), value))
    return f"{value:08x}"
