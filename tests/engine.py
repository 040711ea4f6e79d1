"""An engine as vLLM is one: it keeps keys and values of many texts itself, and attends in the place of each layer."""

import contextlib

import torch
from torch import nn
from transformers import AttentionInterface


class Engine:
    """Holds the keys and values of texts by layer. A step lays what is new of all texts side by side, in one row."""

    def __init__(self, model: nn.Module):
        self.model, self.held, self.texts = model, {}, []

    def attend(self, module, query, key, value, attention_mask, scaling, **kwargs):
        """As vLLM: query [1, heads, tokens, dim] -> [tokens, heads * dim], without the row."""
        assert attention_mask is None and len(query) == 1
        config, group = module.config, module.num_key_value_groups
        window = config.sliding_window if config.layer_types[module.layer_idx] == "sliding_attention" else None
        answers, start = [], 0
        for text, length in self.texts:
            new = [x[0, :, start : start + length] for x in (key, value)]
            held = self.held.get((module.layer_idx, text))
            if held is not None:
                new = [torch.cat(pair, dim=1) for pair in zip(held, new, strict=True)]
            self.held[module.layer_idx, text] = new
            keys, values = (x.repeat_interleave(group, dim=0) for x in new)
            scores = query[0, :, start : start + length] @ keys.mT * scaling
            asking = torch.arange(keys.shape[1] - length, keys.shape[1])[:, None]
            distance = asking - torch.arange(keys.shape[1])
            seen = (distance >= 0) & (distance < (window or keys.shape[1]))
            answers.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values)
            start += length
        return torch.cat(answers, dim=1).transpose(0, 1).flatten(1), None

    @torch.no_grad()
    def step(self, new: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the model answers to the new tokens [length] of each text, [length, vocabulary]."""
        counts = {text: self.seen(text) for text in new}
        self.texts = [(text, len(tokens)) for text, tokens in new.items()]
        positions = torch.cat([torch.arange(length) + counts[text] for text, length in self.texts])
        tokens = torch.cat(list(new.values()))
        told = {"position_ids": positions[None], "use_cache": False, "return_dict": False}
        logits = self.model.lm_head(self.model.model(tokens[None], **told)[0][0])
        return dict(zip(new, logits.split([length for _, length in self.texts]), strict=True))

    def seen(self, text: str) -> int:
        return self.held[0, text][0].shape[1] if (0, text) in self.held else 0


@contextlib.contextmanager
def served(model: nn.Module):
    """The engine that `model` runs in."""
    engine, before = Engine(model), model.config._attn_implementation
    AttentionInterface.register("vllm", engine.attend)
    model.set_attn_implementation("vllm")
    try:
        yield engine
    finally:
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop("vllm")
