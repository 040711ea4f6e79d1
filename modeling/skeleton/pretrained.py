"""What every model of ours is to transformers."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from ..layers.experts import SORTED
from .config import ArchConfig


class HasExperts:
    """A method that tells whether there are experts to compute: of a model by its config, since any architecture may
    have them, of a class by its kind of config. Experts that transformers can compute, it can also deal out."""

    def __get__(self, model: PreTrainedModel | None, model_class: type[PreTrainedModel]) -> Callable[[], bool]:
        return functools.partial(
            bool, model_class.config_class.base_model_ep_plan if model is None else model.config.has_experts
        )


class ArchPreTrainedModel(PreTrainedModel):
    config: ArchConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if hasattr(module, "init_parameters"):
            module.init_parameters(self.config.initializer_range)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False):
        """As for transformers' own models. For others it passes over modules without parameters of their own, such as a
        layer that scales its parts; our `init_parameters` leave loaded parameters alone by themselves."""
        super()._initialize_weights(module, is_custom_code=False)

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """As in transformers, but in our own key names unless `save_original_format` asks for those of a converted
        checkpoint: a resumed Trainer reads no others, and would silently drop the rest."""
        return super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers; a checkpoint of another architecture or a damaged file is named in the error."""
        source = pretrained_model_name_or_path
        config = kwargs.get("config")
        if source is not None and not isinstance(config, cls.config_class):
            fields, _ = cls.config_class.get_config_dict(source, **hub_options(kwargs))
            found = fields.get("model_type")
            if found is not None and found != cls.config_class.model_type:
                raise ValueError(
                    f"{source} holds a {found!r} checkpoint, not {cls.config_class.model_type!r}. If hf_arch knows the "
                    "original, `hf-arch convert` translates it."
                )
        try:
            loaded = super().from_pretrained(source, *args, **kwargs)
            leave_unpacked(loaded[0] if isinstance(loaded, tuple) else loaded)
            return loaded
        except SafetensorError as error:
            files = ", ".join(sorted(path.name for path in Path(str(source)).glob("*.safetensors"))) or "its weights"
            raise OSError(
                f"{source} is damaged: {files} cannot be read ({error}). Copy or download it again."
            ) from error

    # transformers would decide these by the name of the class, and by words in the file that the class is written in

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    _can_set_experts_implementation = HasExperts()

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As in transformers, but ours where none is asked for."""
        return super().get_correct_experts_implementation(requested_experts or SORTED)

    def set_experts_implementation(self, experts_implementation: str | dict) -> None:
        """As in transformers, also where a stack has a config of its own, which is of the same class as the whole's."""
        super().set_experts_implementation(experts_implementation)
        for part in self.modules():
            own = isinstance(part, ArchPreTrainedModel) and part.config is not self.config
            if own and part._can_set_experts_implementation():
                part.set_experts_implementation(experts_implementation)


def leave_unpacked(model: nn.Module) -> None:
    """bitsandbytes packs matrices of four bits anew when a CPU uses them first, and unpacks them wrongly for a state
    dict, be it that of an adapter (0.50.2): they stay as they are."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def hub_options(kwargs: dict) -> dict:
    """Of the arguments of from_pretrained, those that say where a checkpoint is."""
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    return {name: kwargs[name] for name in names if name in kwargs}
