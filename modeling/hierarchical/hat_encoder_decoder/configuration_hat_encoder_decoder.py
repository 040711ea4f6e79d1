"""An encoder that is HAT (Chalkidis et al., 2022, arXiv:2210.05529), and a decoder that reads the document as it is
divided: hierarchical attention (Nallapati et al., 2016, arXiv:1602.06023, section 2.4)."""

import dataclasses
from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from ...dense.encoder_decoder.configuration_encoder_decoder import ArchEncoderDecoderConfig
from ...skeleton.expert_config import SPARSE
from ..hat.configuration_hat import ArchHatConfig

# Fields that both have, but of which the encoder has its own, or HAT's
OF_DECODER = {
    *("num_hidden_layers", "layer_types", "feed_forward_types", "position_type", "residual_type", "use_cache"),
    *("is_encoder_decoder", "tie_word_embeddings", "pad_token_id", "architectures", "output_router_logits"),
}


@strict
class ArchHatEncoderDecoderConfig(ArchEncoderDecoderConfig):
    """The encoder is a HAT with learned places and norms after each part; sizes, biases, dropout and the activation are
    those of both stacks. The rest is of the decoder, which has the choices of the Transformer.

    num_chosen_segments (`int`, defaults to 4):
        How many segments of the source each head of the decoder chooses at each token, to attend to the tokens of
        these. Where a document has no more, all of it is seen.
    segment_lengths, shared_levels, encoder_layer_types, encoder_feed_forward_types:
        As `ArchHatConfig` has them without `encoder_`. The decoder chooses among segments of level 0.
    encoder_num_hidden_layers (`int`, defaults to 16), num_hidden_layers (`int`, defaults to 6):
        Layers of the encoder, and of the decoder.
    max_position_embeddings (`int`, defaults to 16384):
        Tokens of the longest document, of full segments; and of an answer, where its positions are a table.
    """

    model_type = "hf_arch_hat_encoder_decoder"
    feed_forward_kinds: ClassVar[tuple[str, ...]] = ("dense", "gated", *SPARSE)

    vocab_size: int = 50265
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 6
    encoder_num_hidden_layers: int | None = 16
    num_attention_heads: int = 12
    segment_lengths: list[int] | None = None
    shared_levels: bool = False
    num_chosen_segments: int = 4
    max_position_embeddings: int = 16384
    position_type: Literal["none", "sinusoidal", "learned", "rope", "xpos", "alibi", "t5"] = "rope"
    norm_type: Literal["rms_norm", "layer_norm"] = "layer_norm"
    norm_eps: float = 1e-5
    hidden_act: str = "gelu"
    attention_bias: bool = True
    mlp_bias: bool = True
    embedding_norm: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        if self.segment_lengths is None:
            self.segment_lengths = [128]
        super().__post_init__(**kwargs)

    def encoder_layer_pattern(self) -> list[str]:
        layers, lengths = self.encoder_num_hidden_layers, self.segment_lengths
        return ArchHatConfig(num_hidden_layers=layers, segment_lengths=lengths).layer_types

    def encoder_feed_forward_pattern(self) -> list[str]:
        """HAT's, sparse where the decoder's are."""
        return [kind if kind in SPARSE else "dense" for kind in self.feed_forward_types] or ["dense"]

    def stack(self, name: str) -> "ArchHatEncoderDecoderConfig | ArchHatConfig":
        """The config of one stack: `"encoder"`, that of a HAT, or `"decoder"`."""
        if name == "decoder":
            return self.decoder_stack()
        names = {field.name for field in dataclasses.fields(ArchHatConfig)} - OF_DECODER
        fields = {name: getattr(self, name) for name in names if hasattr(self, name)}
        if not {*self.encoder_feed_forward_types} & {*SPARSE}:
            fields["num_local_experts"] = None  # those of the whole are the decoder's
        config = ArchHatConfig(
            **fields,
            num_hidden_layers=self.encoder_num_hidden_layers,
            layer_types=self.encoder_layer_types,
            feed_forward_types=self.encoder_feed_forward_types,
            pad_token_id=None if self.decoder_start_token_id == self.pad_token_id else self.pad_token_id,
            output_attentions=self.output_attentions,
            attn_implementation=self._attn_implementation,
            experts_implementation=self._experts_implementation,
        )
        if config.has_experts:
            config.output_router_logits = self.output_router_logits
        # the stacks share their embeddings, which therefore stay with the whole
        config.base_model_fsdp_plan = {key: how for key, how in config.base_model_fsdp_plan.items() if "." in key}
        return config

    def decoder_stack(self) -> "ArchHatEncoderDecoderConfig":
        """As of other encoder-decoders; queries and keys of segments are dealt out as those of tokens are."""
        config = super().stack("decoder")
        for name in ("q_proj", "k_proj"):
            how = config.base_model_tp_plan.get(f"layers.*.cross_attention.{name}")
            config.base_model_tp_plan |= {f"layers.*.cross_attention.segment_{name}": how} if how else {}
        return config

    def validate_encoder(self):
        try:
            self.stack("encoder")
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__ or error)) from error

    def validate_architecture(self):
        super().validate_architecture()
        if self.num_chosen_segments < 1:
            raise ValueError(f"num_chosen_segments is {self.num_chosen_segments}; a query sees at least one segment.")
