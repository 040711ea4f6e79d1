import torch
from torch import nn
from transformers.activations import ACT2FN

# Numbers inside a feed-forward at once, with and without a backward pass, to which each chunk is more work
INSIDE_AT_ONCE = {True: 2**22, False: 2**19}


class MLP(nn.Module):
    """down(act(up(x))), by default `config.intermediate_size` wide inside."""

    def __init__(self, config, layer_idx: int, inner_size: int | None = None):
        super().__init__()
        inner_size = inner_size or config.intermediate_size
        self.up_proj = nn.Linear(config.hidden_size, inner_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class ChunkedMLP(MLP):
    """The same a part of the tokens at a time, so that what is inside is never as long as the text (Kitaev et al.,
    2020, arXiv:2001.04451, section 3)."""

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        inside = hidden_states.shape[0] * self.up_proj.out_features
        tokens = max(1, INSIDE_AT_ONCE[torch.is_grad_enabled()] // inside)
        forward = super().forward
        return torch.cat([forward(part) for part in hidden_states.split(tokens, dim=1)], dim=1)


class GatedMLP(MLP):
    """down(act(gate(x)) * up(x)): GLU, GeGLU and SwiGLU, by the activation (Shazeer, 2020, arXiv:2002.05202)."""

    def __init__(self, config, layer_idx: int, inner_size: int | None = None):
        super().__init__(config, layer_idx, inner_size)
        self.gate_proj = nn.Linear(config.hidden_size, self.up_proj.out_features, bias=config.mlp_bias)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        gate, up = self.act_fn(self.gate_proj(hidden_states)), self.up_proj(hidden_states)
        # Backward needs both factors; without it their product takes the place of one, the largest tensor of a layer
        return self.down_proj(gate * up if gate.requires_grad else gate.mul_(up))
