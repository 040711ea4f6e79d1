"""What a text says, as a weighted mean of its members (Yang et al., 2016, aclanthology N16-1174, equations 5 to 10)."""

import torch
from torch import nn
from transformers import initialization as init

from .mixer import Mixer


class AttentionPooling(Mixer):
    """sum_t a_t h_t, a = softmax_t(u . tanh(W h_t + b)): `u` is the question that every text is asked.

    It answers with one vector [texts, 1, size] for the members `encoder_hidden_states` [texts, longest, size], of which
    `encoder_attention_mask` [texts, longest] (bool, or None) says which are there.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.in_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.question = nn.Parameter(torch.empty(config.hidden_size))

    def init_parameters(self, std):
        init.normal_(self.question, std=std)

    def forward(self, hidden_states, encoder_hidden_states=None, encoder_attention_mask=None, **kwargs):
        scores = torch.tanh(self.in_proj(encoder_hidden_states)) @ self.question.to(hidden_states.dtype)
        if encoder_attention_mask is not None:
            scores = scores.masked_fill(~encoder_attention_mask, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1)[:, None].to(encoder_hidden_states.dtype) @ encoder_hidden_states
