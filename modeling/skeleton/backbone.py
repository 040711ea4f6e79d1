"""The one stack of layers: embed, then layers of sub-layers, then norm. Architectures fill in the slots."""

import functools
from collections.abc import Callable
from typing import ClassVar, Unpack

import torch
from torch import nn
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..layers.cache import growing
from ..layers.feed_forward import MLP, GatedMLP
from ..layers.mixer import Mixer
from ..layers.norm import RMSNorm
from ..layers.positions import NoPositions
from ..layers.record import AttentionWeights, CrossAttentionWeights, RouterChoices, RouterLogits
from ..layers.residual import PreNorm, Residual
from ..layers.sparse import SPARSE_FEED_FORWARDS
from ..layers.training_buffer import follow_optimizers, watch_training_buffers
from ..layers.view import View
from .checks import attends_by_itself, check_checkpointing, check_engine, check_inputs
from .config import ArchConfig
from .masks import MASKS, all_straight, count_positions, key_positions, number_documents
from .pretrained import ArchPreTrainedModel
from .routing import load_balancing, router_z, with_choices


class Layer(GradientCheckpointingLayer):
    """Sub-layers (a mixer, a feed-forward, ...), wired by `residual` into the part of the stream that `view` shows."""

    def __init__(self, view: View, residual: Residual, sublayers: dict[str, nn.Module]):
        super().__init__()
        self.view, self.residual, self.names = view, residual, tuple(sublayers)
        for name, sublayer in sublayers.items():
            self.add_module(name, sublayer)

    @property
    def sublayers(self) -> dict[str, nn.Module]:
        return {name: self._modules[name] for name in self.names}

    def init_parameters(self, std: float) -> None:
        self.residual.init_sublayers(self.sublayers)

    def forward(
        self, stream: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, **context
    ) -> torch.Tensor:
        """What needs a gradient comes by position: reentrant checkpointing looks nowhere else."""
        context["encoder_hidden_states"] = encoder_hidden_states
        return self.view(stream, functools.partial(self.residual, sublayers=self.sublayers), **context)


class Backbone(ArchPreTrainedModel):
    """An architecture names the classes that fill the slots; dicts are keyed by the types in the config."""

    mixers: ClassVar[dict[str, type[Mixer]]]
    cross_attention: ClassVar[type[nn.Module] | None] = None  # of a decoder that is told `encoder_hidden_states`
    feed_forwards: ClassVar[dict[str, type[nn.Module] | None]] = {
        "gated": GatedMLP,
        "dense": MLP,
        "none": None,
        **SPARSE_FEED_FORWARDS,
    }
    residual: ClassVar[type[Residual]] = PreNorm
    views: ClassVar[dict[str, type[View]]] = {}
    positions: ClassVar[type[nn.Module]] = NoPositions
    masks: ClassVar[dict[str, Callable]] = {}
    norm_class: ClassVar[Callable[[int, float], nn.Module]] = RMSNorm
    _can_record_outputs = {
        "hidden_states": Layer,
        "attentions": OutputRecorder(AttentionWeights, index=0),
        "cross_attentions": OutputRecorder(CrossAttentionWeights, index=0),
        "router_logits": OutputRecorder(RouterLogits, index=0),
        "router_choices": OutputRecorder(RouterChoices, index=0),
    }

    def __init__(self, config: ArchConfig):
        super().__init__(config)
        self.embed_tokens = self.make_embedding()
        if config.type_vocab_size:
            self.embed_segments = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.embed_positions = self.positions(config)
        self.embed_norm = self.make_norm() if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout)
        # The layer and its kind, call by call; of each kind the first layer
        self.calls = tuple(zip(config.layer_groups, config.layer_types, strict=True))
        self.kinds = {kind: config.layer_types.index(kind) for kind in dict.fromkeys(config.layer_types)}
        firsts = [config.layer_groups.index(group) for group in sorted(set(config.layer_groups))]
        self.layers = nn.ModuleList(self.make_layer(layer_idx) for layer_idx in firsts)
        final = self.norm_class(config.output_size, config.norm_eps)
        self.norm = final if self.residual.final_norm else nn.Identity()
        self.add_parts(config)
        self.reads_documents = any(getattr(module, "reads_documents", False) for module in self.modules())
        self.gradient_checkpointing = False
        self.post_init()
        self.own_weights = frozenset(name for name, _ in self.named_parameters())  # those of adapters come later
        follow_optimizers(self, self.own_weights)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        follow_optimizers(self, self.own_weights)  # a copy has optimizers of its own

    def make_embedding(self) -> nn.Module:
        return nn.Embedding(self.config.vocab_size, self.config.hidden_size, self.config.pad_token_id)

    def make_norm(self) -> nn.Module:
        return self.norm_class(self.config.hidden_size, self.config.norm_eps)

    def add_parts(self, config: ArchConfig) -> None:
        """Modules beside those of every stack."""

    def config_of(self, layer_idx: int) -> ArchConfig:
        """What a layer is built from."""
        return self.config

    def make_layer(self, layer_idx: int) -> Layer:
        config = self.config_of(layer_idx)
        sublayers = {name: kind(config, layer_idx) for name, kind in self.sublayers(layer_idx).items() if kind}
        view = self.views.get(config.layer_types[layer_idx], View)(config, layer_idx)
        norm = functools.partial(self.norm_class, config.hidden_size, config.norm_eps)
        return Layer(view, self.residual(config, tuple(sublayers), norm), sublayers)

    def sublayers(self, layer_idx: int) -> dict[str, type[nn.Module] | None]:
        """The classes of a layer's parts, in order."""
        return {
            "mixer": self.mixers[self.config.layer_types[layer_idx]],
            "cross_attention": self.cross_attention,
            "feed_forward": self.feed_forwards[self.config.feed_forward_types[layer_idx]],
        }

    @with_choices
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        check_inputs(self.config, input_ids, inputs_embeds, attention_mask, position_ids, past_key_values)
        if attends_by_itself(self.config):
            check_engine(self.config, self.embed_positions.biased, reads_source=self.cross_attention is not None)
        if self.training:
            watch_training_buffers(self)
            if self.gradient_checkpointing and past_key_values is not None:
                raise ValueError(
                    "Gradient checkpointing runs layers twice, which would update past_key_values twice. Train without "
                    "it; shorter segments save memory, too."
                )
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        # Masks first: transformers and we look for packed documents only where there is no cache, not even an empty one
        masks = self.make_masks(hidden_states, attention_mask, past_key_values, position_ids, **kwargs)
        caching = self.config.use_cache if use_cache is None else use_cache
        if caching and past_key_values is None and not self.training:
            past_key_values = self.make_cache()
        if position_ids is None:
            position_ids = masks.get("position_ids")
        if position_ids is None:
            position_ids = count_positions(hidden_states, attention_mask, past_key_values)
        if self.config.type_vocab_size:  # as in BERT, all are of kind 0 where nothing is said
            segments = torch.zeros_like(position_ids) if token_type_ids is None else token_type_ids
            hidden_states = hidden_states + self.embed_segments(segments)
        hidden_states = self.run(hidden_states, position_ids, masks, past_key_values, encoder_hidden_states, **kwargs)
        return MoeModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)

    def run(
        self, hidden_states, position_ids, masks: dict, past_key_values, encoder_hidden_states=None, **context
    ) -> torch.Tensor:
        """Embeddings [batch, length, size] -> the answer of the stack."""
        hidden_states, position_embeddings = self.embed_positions(hidden_states, position_ids)
        context["documents"] = masks.get("documents")
        stream = self.begin(self.dropout(self.embed_norm(hidden_states)), masks)
        for layer_idx, (group, kind) in enumerate(self.calls):
            stream = self.call_layer(
                self.layers[group],
                stream,
                encoder_hidden_states,
                attention_mask=masks[kind],
                key_positions=masks.get(f"{kind}_key_positions"),
                position_embeddings=position_embeddings,
                layer_idx=layer_idx,
                past_key_values=past_key_values,
                **context,
            )
        return self.norm(self.residual.leave(stream).to(hidden_states.dtype))

    @staticmethod
    def call_layer(layer: Layer, stream: torch.Tensor, *args, **context) -> torch.Tensor:
        """Here checkpointing has let go of the stream: for what is made of it between layers."""
        return layer(stream, *args, **context)

    def begin(self, hidden_states: torch.Tensor, masks: dict) -> torch.Tensor:
        """The stream that the first layer reads."""
        return self.residual.enter(hidden_states)

    def make_cache(self) -> Cache:
        if unknown := set(self.config.layer_types) - set(DYNAMIC_LAYER_TYPE_MAPPING):
            raise ValueError(f"Layers of type {', '.join(unknown)} keep no cache: call with use_cache=False.")
        return growing(DynamicCache(config=self.config))

    def make_masks(
        self, inputs_embeds, attention_mask, past_key_values, position_ids, **context
    ) -> dict[str, torch.Tensor | None]:
        """One mask per layer type in use, shared by its layers, the positions of its keys where a bias asks for them,
        and the documents where a sub-layer does. generate() may hand them over ready; an engine asks for none."""
        if isinstance(attention_mask, dict):
            return attention_mask
        if attention_mask is None and attends_by_itself(self.config):
            return dict.fromkeys(self.kinds)
        told = {"attention_mask": attention_mask, "past_key_values": past_key_values, "position_ids": position_ids}
        makers, masks = MASKS | self.masks, {}
        for kind, layer_idx in self.kinds.items():
            given = {"config": self.config, "inputs_embeds": inputs_embeds, "layer_idx": layer_idx}
            given["biased"] = self.embed_positions.biased
            masks[kind] = makers[kind](**given, **told, **context)
        if self.reads_documents:
            numbers = context.get("documents")
            masks["documents"] = number_documents(self.config, inputs_embeds, **told) if numbers is None else numbers
        if self.embed_positions.biased and not all_straight(inputs_embeds, **told):
            for kind, layer_idx in self.kinds.items():
                masks[f"{kind}_key_positions"] = key_positions(inputs_embeds, layer_idx, **told)
        return masks

    def routing_losses(self, router_logits, router_choices) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss that keeps experts equally busy, of what this stack's routers recorded for real tokens, and what is
        added to the whole loss: it and the z-loss, times their weights in the config. Where experts choose, they are
        equally busy without it."""
        if torch.is_grad_enabled():
            check_checkpointing(self.layers)
        config, real = self.config, [choices[:, 0] >= 0 for choices in router_choices]
        types = zip(self.calls, config.feed_forward_types, strict=True)
        parts = [self.layers[group].feed_forward for (group, _), kind in types if self.records_routes(kind)]
        told = zip(parts, router_logits, real, strict=True)
        told = [(logits, part.router.taken, there) for part, logits, there in told if part.tokens_choose]
        balance = load_balancing(*zip(*told, strict=True)) if told else router_logits[0].new_zeros(())
        added = config.router_aux_loss_coef * balance
        if config.router_z_loss_coef:
            added = added + config.router_z_loss_coef * router_z(router_logits, real)
        return balance, added

    def records_routes(self, kind: str) -> bool:
        """Whether feed-forwards of a type choose, and record it."""
        return getattr(self.feed_forwards[kind], "routes", False)
