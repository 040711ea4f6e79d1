"""A backbone and a head that names tokens."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache
from transformers.generation import GenerationMixin, GenerationMode
from transformers.modeling_outputs import MaskedLMOutput, ModelOutput, MoeCausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import TransformersKwargs, can_return_tuple

from ..layers.cache import RecurrentCacheLayer, growing
from .backbone import Backbone
from .config import ArchConfig
from .loss import LOGITS_AT_ONCE, chunked_cross_entropy, share_of_batch
from .pretrained import ArchPreTrainedModel


class Head(ArchPreTrainedModel):
    """What the heads share: `self.model` is the backbone, `add_head` builds the rest."""

    backbone: ClassVar[type[Backbone]]

    def __init__(self, config: ArchConfig):
        super().__init__(config)
        self.model = self.backbone(config)
        self.add_head(config)
        self.post_init()

    def add_head(self, config: ArchConfig) -> None:
        raise NotImplementedError

    def with_routing(
        self, loss: torch.Tensor | None, outputs: ModelOutput, labels: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The loss of `labels` with those of the routers added, and the one that keeps experts equally busy: the loss
        as it is and None where nothing of routers was asked for."""
        told = (self.model, outputs.get("router_logits"), outputs.get("router_choices"))
        return add_routing(loss, share_of_batch(labels, **kwargs), told)


def add_routing(
    loss: torch.Tensor | None, share: torch.Tensor | float, *stacks: tuple[Backbone, tuple | None, tuple | None]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """As `Head.with_routing`, of a `share` of a batch; stacks: backbones, with logits and choices of their routers."""
    found = [stack.routing_losses(logits, choices) for stack, logits, choices in stacks if logits]
    if not found:
        return loss, None
    balance, added = (sum(parts) for parts in zip(*found, strict=True))
    return None if loss is None else loss + share * added, balance


@dataclass
class CausalLMOutput(MoeCausalLMOutputWithPast):
    """`router_choices`: [tokens, choices] of each sparse layer, the experts that tokens take; the number of all experts
    where one had no room, -1 where a token is padding."""

    router_choices: tuple[torch.LongTensor, ...] | None = None


class CausalLM(Head, GenerationMixin):
    """A head that names the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def add_head(self, config):
        if config.pooling != "last":
            raise ValueError(
                "A model that sees the future cannot name the next token: take ForMaskedLM, or a causal one."
            )
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.output_size, config.vocab_size, bias=False)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        token_type_ids: torch.LongTensor | None = None,
        output_router_logits: bool | None = None,
        return_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutput:
        """
        labels (`torch.LongTensor` [batch, length], *optional*):
            The tokens themselves (they are shifted here), -100 where nothing is asked. In training, when all logits
            would be more than 2^24 numbers, the loss is made without them and `logits` is None, unless `return_logits`
            asks for them.
        output_router_logits (`bool`, *optional*):
            Whether to answer with the logits and choices of the routers and with `aux_loss`, which keeps experts
            equally busy and is added to the loss, times `config.router_aux_loss_coef`. By default as the config says.
        """
        if labels is not None and self.training:
            kwargs |= self.further_context()
        read = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        outputs = self.model(
            *read,
            use_cache=use_cache,
            token_type_ids=token_type_ids,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        asked = (labels, logits_to_keep, return_logits)
        loss, logits = loss_and_logits(self, outputs.last_hidden_state, *asked, **kwargs)
        if loss is not None and self.training:
            loss = self.with_further_losses(loss, outputs.last_hidden_state, labels, *read, **kwargs)
        loss, aux_loss = self.with_routing(loss, outputs, labels, **kwargs)
        return CausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            router_choices=outputs.get("router_choices"),
        )

    def further_context(self) -> dict:
        """What layers are told in training beside what the call says."""
        return {}

    def with_further_losses(self, loss: torch.Tensor, hidden_states: torch.Tensor, labels, *read, **kwargs):
        """The loss of next tokens with what an architecture adds in training. `read`: what the backbone was told, up to
        `inputs_embeds`."""
        return loss

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args):
        """generate() makes the cache; its layers are ours where transformers' would copy everything at every step."""
        if generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant:
            self.check_can_go_back()
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args)
        made = model_kwargs.get("past_key_values")
        if given is None and generation_config.cache_implementation in (None, "dynamic") and made is not None:
            growing(made)

    def check_can_go_back(self) -> None:
        """Assisted decoding drops tokens that were read. A recurrence does it by going back to before the last call, a
        window cannot go back so far."""
        kinds = [DYNAMIC_LAYER_TYPE_MAPPING[kind] for kind in dict.fromkeys(self.config.layer_types)]
        recurrent = any(issubclass(kind, RecurrentCacheLayer) for kind in kinds)
        if recurrent and any(getattr(kind, "is_sliding", False) for kind in kinds):
            raise ValueError(
                f"Assisted decoding has to go back in the text, and {self.config.model_type} with layers "
                f"{', '.join(dict.fromkeys(self.config.layer_types))} cannot: generate without assistant_model and "
                "prompt_lookup_num_tokens."
            )

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        **kwargs,
    ):
        """generate() takes embeddings where they are named here."""
        if next_sequence_length is not None and past_key_values is not None:
            told = {"attention_mask": attention_mask, "position_ids": kwargs.get("position_ids")}
            self.read_again(input_ids[:, :-next_sequence_length], past_key_values, **told)
        given = (input_ids, next_sequence_length, past_key_values, attention_mask, inputs_embeds, is_first_iteration)
        return super().prepare_inputs_for_generation(*given, **kwargs)

    def read_again(self, input_ids, past_key_values, attention_mask, position_ids) -> None:
        """In assisted decoding a recurrence goes back to before the last call: read from there what was accepted."""
        layers = getattr(past_key_values, "layers", [])
        if not any(isinstance(layer, RecurrentCacheLayer) and layer.record_past and not layer.past for layer in layers):
            return
        seen = min(layer.get_seq_length() for layer in layers)
        for layer in layers:
            layer.crop(seen - layer.get_seq_length())
        length = input_ids.shape[1]
        if seen < length:
            self.model(
                input_ids[:, seen:],
                attention_mask=None if attention_mask is None else attention_mask[:, :length],
                position_ids=None if position_ids is None else position_ids[:, seen:length],
                past_key_values=past_key_values,
            )

    def create_masks_for_generate(
        self, config, inputs_embeds, attention_mask, past_key_values, position_ids=None, **kwargs
    ):
        """Called by generate() with a static cache, which must not see the mask grow."""
        return self.model.make_masks(inputs_embeds, attention_mask, past_key_values, position_ids)


class MaskedLMHead(nn.Module):
    """decoder(norm(act(dense(x)))): BERT, RoBERTa."""

    def __init__(self, config: ArchConfig, norm: nn.Module):
        super().__init__()
        self.dense = nn.Linear(config.output_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.norm = norm
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.norm(self.act_fn(self.dense(hidden_states))))


class MaskedLM(Head):
    """A head that names the hidden tokens."""

    _tied_weights_keys = {"lm_head.decoder.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head.decoder": "colwise_gather_output"}

    def add_head(self, config):
        if config.pooling == "last":
            raise ValueError("A masked token is read from both sides: this model is causal. Take ForCausalLM.")
        self.lm_head = MaskedLMHead(config, self.model.make_norm())

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        token_type_ids=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        told = {"inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids}
        outputs = self.model(input_ids, attention_mask, position_ids, **told, **kwargs)
        check_labels(labels, outputs.last_hidden_state)
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            loss, _ = self.with_routing(loss, outputs, labels, **kwargs | {"shift_labels": labels})
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def also_named(forward: Callable, *names: str) -> Callable:
    """The forward of a head, which hands over to the backbone what it does not know, with further inputs named: the
    Trainer hands over what is named, and nothing else."""

    @functools.wraps(forward)
    def call(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    known = inspect.signature(forward)
    *given, rest = known.parameters.values()
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    call.__signature__ = known.replace(parameters=[*given, *added, rest])
    return call


def check_labels(labels: torch.Tensor | None, hidden_states: torch.Tensor) -> None:
    if labels is not None and labels.shape != hidden_states.shape[:2]:
        raise ValueError(f"labels are {list(labels.shape)}, but the tokens {list(hidden_states.shape[:2])}.")


def loss_and_logits(
    model: Head,
    hidden_states: torch.Tensor,
    labels: torch.Tensor | None,
    logits_to_keep: int | torch.Tensor,
    return_logits: bool = False,
    **kwargs,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What `model.lm_head` makes of the hidden states; a loss in training over many logits is made without them, unless
    `return_logits`."""
    check_labels(labels, hidden_states)
    if getattr(model.config, "scale_logits", False):
        hidden_states = hidden_states * model.config.hidden_size**-0.5
    many = hidden_states[..., 0].numel() * model.vocab_size > LOGITS_AT_ONCE
    if labels is not None and model.training and many and not return_logits:
        return chunked_cross_entropy(hidden_states, model.lm_head, labels, **kwargs), None
    logits = model.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
    if labels is None:
        return None, logits
    return model.loss_function(logits=logits, labels=labels, vocab_size=model.config.vocab_size, **kwargs), logits
