"""Mixture-of-Depths (Raposo et al., 2024, arXiv:2404.02258) and early exits (CALM: arXiv:2207.07061)."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from ...skeleton.config import AttentionConfig


@strict
class ArchMixtureOfDepthsConfig(AttentionConfig):
    """
    layer_types (`list[str]`, *optional*):
        Of each layer, `"routed_attention"`, which works on some tokens, `"full_attention"`, on all, or
        `"early_exit_attention"`, on those that have not left; after such a layer there are no others. By default every
        other layer is routed, as works best in the paper.
    capacity (`float`, defaults to 0.125):
        The share of a document's tokens that a routed layer works on in training, more than 0 and at most 1.
    predictor_size (`int`, *optional*):
        Width inside the predictors that choose tokens one by one outside of training; by default a quarter of
        `hidden_size`.
    early_exit_threshold (`float`, defaults to 0.9), exit_confidence (`str`, defaults to `"classifier"`):
        A token leaves after a layer of type `"early_exit_attention"` where its confidence is over the threshold: what a
        classifier in each layer says, or (`"saturation"`) the cosine of what the layer was given and answers.
    """

    model_type = "hf_arch_mixture_of_depths"
    layer_kinds = ("full_attention", "routed_attention", "early_exit_attention")

    capacity: float | int = 0.125
    predictor_size: int | None = None
    early_exit_threshold: float | int = 0.9
    exit_confidence: Literal["classifier", "saturation"] = "classifier"

    def layer_pattern(self) -> list[str]:
        return ["full_attention", "routed_attention"]

    def validate_architecture(self):
        super().validate_architecture()
        if not 0 < self.capacity <= 1:
            raise ValueError(f"capacity is {self.capacity}; it is a share of the tokens, more than 0 and at most 1.")
        if self.predictor_size is not None and self.predictor_size < 1:
            raise ValueError(f"predictor_size is {self.predictor_size}; it must be at least 1.")
        if not -1 <= self.early_exit_threshold <= 1:
            raise ValueError(f"early_exit_threshold is {self.early_exit_threshold}; a confidence is at most 1.")
        leaving = [kind == "early_exit_attention" for kind in self.layer_types]
        if leaving != sorted(leaving):
            raise ValueError(
                "A token that has left the stack works in no later layer: all layers after the first of type "
                "early_exit_attention must be of that type."
            )
