"""The Switch Transformer (Fedus et al., 2021, arXiv:2101.03961)."""

from huggingface_hub.dataclasses import strict

from ...dense.encoder_decoder.configuration_encoder_decoder import ArchEncoderDecoderConfig
from ...skeleton.config import ArchConfig
from ...skeleton.expert_config import EXPERT_PARALLEL


@strict
class ArchSwitchConfig(ArchEncoderDecoderConfig):
    """An encoder-decoder, its encoder alone, or a decoder alone, some of whose feed-forwards are of many experts.

    is_decoder (`bool`, defaults to `False`):
        Whether this is a decoder alone, a language model; `is_encoder_decoder` is then `False`.
    sparse_step (`int`, defaults to 2), encoder_sparse_step (`int`, *optional*):
        Of how many layers one is sparse, the second of each group, in the decoder and in the encoder (by default as in
        the decoder), where `feed_forward_types` and `encoder_feed_forward_types` do not say it layer by layer.
    num_local_experts (`int`, defaults to 8), num_experts_per_tok (`int`, defaults to 1):
        Experts of a sparse layer, and how many of them a token takes.
    expert_capacity_factor (`float`, defaults to 1.25), router_jitter_noise (`float`, defaults to 0.01):
        As in every architecture with experts; both are of training alone (sections 2.2 and 2.4).
    router_aux_loss_coef, router_z_loss_coef (`float`, default to 0.001):
        Those of google/switch-base-8; the paper has 0.01, and no z-loss.
    """

    model_type = "hf_arch_switch"
    base_model_ep_plan = EXPERT_PARALLEL["switch"]

    is_decoder: bool = False
    sparse_step: int = 2
    encoder_sparse_step: int | None = None
    hidden_act: str = "relu"
    num_local_experts: int | None = 8
    num_experts_per_tok: int = 1
    expert_capacity_factor: float | int | None = 1.25
    router_jitter_noise: float | int = 0.01
    router_aux_loss_coef: float | int = 0.001
    router_z_loss_coef: float | int = 0.001

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.is_decoder:  # one stack, which has the plans of one
            self.base_model_tp_plan, self.base_model_ep_plan = self.stack_tp_plan(), self.expert_ep_plan()
            self.base_model_fsdp_plan = ArchConfig.base_model_fsdp_plan

    def feed_forward_pattern(self) -> list[str]:
        return every(self.sparse_step)

    def encoder_feed_forward_pattern(self) -> list[str]:
        step = self.encoder_sparse_step
        return super().encoder_feed_forward_pattern() if step is None else every(step)

    def validate_architecture(self):
        super().validate_architecture()
        for name in ("sparse_step", "encoder_sparse_step"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1, at which all are sparse.")
        if self.is_decoder and self.is_encoder_decoder:
            raise ValueError("A decoder alone (is_decoder=True) has no encoder: set is_encoder_decoder=False.")


def every(step: int) -> list[str]:
    """The feed-forwards of `step` layers, of which the second, or the only one, is sparse."""
    return ["switch" if layer == 1 or step == 1 else "dense" for layer in range(max(step, 1))]
