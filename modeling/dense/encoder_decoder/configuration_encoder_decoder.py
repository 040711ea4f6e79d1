"""The encoder-decoder Transformer (Vaswani et al., 2017, arXiv:1706.03762), as in T5 (Raffel et al., 2020,
arXiv:1910.10683) and with the choices of later models."""

import copy
from typing import Literal

from huggingface_hub.dataclasses import strict

from ...skeleton.config import ArchConfig
from ...skeleton.expert_config import SPARSE
from ..transformer.configuration_transformer import ArchTransformerConfig


@strict
class ArchEncoderDecoderConfig(ArchTransformerConfig):
    """The choices of the Transformer, made for both stacks, by default those of T5 1.1 but for the scale of attention;
    `num_hidden_layers`, `layer_types` and `feed_forward_types` are those of the decoder.

    is_encoder_decoder (`bool`, defaults to `True`):
        Whether both stacks are there; `False` in a checkpoint of the encoder alone.
    encoder_num_hidden_layers (`int`, *optional*):
        Layers of the encoder; as many as the decoder has by default.
    encoder_layer_types, encoder_feed_forward_types (`list[str]`, *optional*):
        The mixer and the feed-forward of each; bidirectional attention, and the decoder's pattern, by default.
    decoder_start_token_id (`int`, defaults to 0):
        What the decoder's input begins with.
    scale_logits (`bool`, defaults to `False`):
        Whether the head reads hidden_size^-0.5 times the decoder's answer, as in the first T5, whose head is tied.
    """

    model_type = "hf_arch_encoder_decoder"
    feed_forward_kinds = ("gated", "dense", *SPARSE)
    keys_to_ignore_at_inference = ["past_key_values", "encoder_last_hidden_state"]

    is_encoder_decoder: bool = True
    encoder_num_hidden_layers: int | None = None
    encoder_layer_types: list[str] | None = None
    encoder_feed_forward_types: list[str] | None = None
    decoder_start_token_id: int = 0
    pad_token_id: int | None = 0
    position_type: Literal["none", "sinusoidal", "learned", "rope", "xpos", "alibi", "t5"] = "t5"
    hidden_act: str = "gelu_new"
    scale_logits: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.encoder_num_hidden_layers is None:
            self.encoder_num_hidden_layers = self.num_hidden_layers
        depth = self.encoder_num_hidden_layers
        if self.encoder_layer_types is None:
            self.encoder_layer_types = self.encoder_layer_pattern()
        if self.encoder_feed_forward_types is None:
            pattern = self.encoder_feed_forward_pattern()
            self.encoder_feed_forward_types = [pattern[i % len(pattern)] for i in range(depth)]
        # the stacks have their own
        self.base_model_tp_plan, self.base_model_ep_plan, self.base_model_fsdp_plan = {}, {}, {}

    def encoder_layer_pattern(self) -> list[str]:
        """The layer types of the encoder."""
        return ["bidirectional_attention"] * self.encoder_num_hidden_layers

    def encoder_feed_forward_pattern(self) -> list[str]:
        return self.feed_forward_types

    @property
    def feed_forwards_in_use(self) -> set[str]:
        return {*self.feed_forward_types, *(self.encoder_feed_forward_types or ())}

    def stack(self, name: str) -> "ArchEncoderDecoderConfig":
        """The config of one stack, `"encoder"` or `"decoder"`, as of a Transformer by itself."""
        encoder, decoder = self.encoder_num_hidden_layers, self.num_hidden_layers
        config = copy.copy(self)
        config.is_encoder_decoder = False
        if self.decoder_start_token_id == self.pad_token_id:
            config.pad_token_id = None  # an embedding that is told it is padding would not learn
        # the stacks share their embeddings, which therefore stay with the whole
        config.base_model_fsdp_plan = {key: how for key, how in ArchConfig.base_model_fsdp_plan.items() if "." in key}
        if name == "decoder":
            of_mixers = ArchTransformerConfig.base_model_tp_plan
            across = {key.replace("mixer", "cross_attention"): how for key, how in of_mixers.items()}
            config.encoder_feed_forward_types = self.feed_forward_types
            config.base_model_tp_plan = self.stack_tp_plan() | across
            config.deep_norm = (3 * decoder) ** 0.25, (12 * decoder) ** -0.25
        else:
            config.num_hidden_layers = encoder
            config.direction, config.use_cache = "bidirectional", False
            config.layer_types, config.feed_forward_types = self.encoder_layer_types, self.encoder_feed_forward_types
            config.base_model_tp_plan = config.stack_tp_plan()
            # arXiv:2203.00555, figure 2
            config.deep_norm = 0.81 * (encoder**4 * decoder) ** (1 / 16), 0.87 * (encoder**4 * decoder) ** (-1 / 16)
        config.base_model_ep_plan = config.expert_ep_plan()
        if not config.has_experts:  # those of the whole are the other stack's
            config.num_local_experts, config.output_router_logits = None, False
        return config

    def validate_architecture(self):
        super().validate_architecture()
        if self.direction != "causal":
            raise ValueError(f"The decoder is causal, the encoder is not: direction cannot be {self.direction!r}.")
        if self.pad_token_id is None:
            raise ValueError("pad_token_id is None, but the decoder's input is padded where labels are -100.")
        if not 0 <= self.decoder_start_token_id < self.vocab_size:
            raise ValueError(
                f"decoder_start_token_id {self.decoder_start_token_id} is not in the vocabulary of {self.vocab_size}."
            )
        if self.encoder_num_hidden_layers < 1:
            raise ValueError(f"encoder_num_hidden_layers is {self.encoder_num_hidden_layers}; it must be at least 1.")
        try:
            self.validate_encoder()
        except ValueError as error:
            raise ValueError(f"In the encoder: {error}") from error

    def validate_encoder(self):
        ArchTransformerConfig.validate_architecture(self.stack("encoder"))
