"""H3 (Fu et al., 2022, arXiv:2212.14052)."""

from huggingface_hub.dataclasses import strict

from ...skeleton.expert_config import SPARSE
from ..configuration_time_invariant import TimeInvariantConfig


@strict
class ArchH3Config(TimeInvariantConfig):
    """
    layer_types (`list[str]`, *optional*):
        `"h3"` by default; `"full_attention"` for the layers that are to attend, as one of six layers does in H3-125M.
    state_head_dim (`int`, defaults to 1):
        Channels of a head: each of its keys meets each of its values in a state of its own.
    num_attention_heads (`int`):
        Of layers that attend.
    """

    base_model_tp_plan = {}
    model_type = "hf_arch_h3"
    layer_kinds = ("h3", "full_attention")
    feed_forward_kinds = ("dense", "gated", *SPARSE)

    state_head_dim: int = 1
    hidden_act: str = "gelu_pytorch_tanh"
    attention_bias: bool = True
    mlp_bias: bool = True

    def validate_architecture(self):
        super().validate_architecture()
        if self.state_head_dim < 1 or self.hidden_size % self.state_head_dim:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of state_head_dim {self.state_head_dim}."
            )
