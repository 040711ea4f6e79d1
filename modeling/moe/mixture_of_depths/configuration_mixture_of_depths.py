"""Mixture-of-Depths (Raposo et al., 2024, arXiv:2404.02258)."""

from huggingface_hub.dataclasses import strict

from ...skeleton.config import AttentionConfig


@strict
class ArchMixtureOfDepthsConfig(AttentionConfig):
    """
    layer_types (`list[str]`, *optional*):
        Of each layer, `"routed_attention"`, which works on some tokens, or `"full_attention"`, on all. By default every
        other layer is routed, as works best in the paper.
    capacity (`float`, defaults to 0.125):
        The share of a document's tokens that a routed layer works on in training, more than 0 and at most 1.
    predictor_size (`int`, *optional*):
        Width inside the predictors that choose tokens one by one outside of training; by default a quarter of
        `hidden_size`.
    """

    model_type = "hf_arch_mixture_of_depths"
    layer_kinds = ("full_attention", "routed_attention")

    capacity: float | int = 0.125
    predictor_size: int | None = None

    def layer_pattern(self) -> list[str]:
        return ["full_attention", "routed_attention"]

    def validate_architecture(self):
        super().validate_architecture()
        if not 0 < self.capacity <= 1:
            raise ValueError(f"capacity is {self.capacity}; it is a share of the tokens, more than 0 and at most 1.")
        if self.predictor_size is not None and self.predictor_size < 1:
            raise ValueError(f"predictor_size is {self.predictor_size}; it must be at least 1.")
