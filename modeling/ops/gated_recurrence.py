"""The gated recurrent unit, GRU (Cho et al., 2014, arXiv:1406.1078), of many texts side by side.

    r_t = sigmoid(x^r_t + U_r h_{t-1} + b_r)      z_t = sigmoid(x^z_t + U_z h_{t-1} + b_z)
    n_t = tanh(x^n_t + r_t * (U_n h_{t-1} + b_n))      h_t = (1 - z_t) * n_t + z_t * h_{t-1}

These are torch's. HAN (Yang et al., 2016, aclanthology N16-1174, equations 1 to 4) has z and 1 - z in each other's
places, which is another sign of what makes z, and b_n outside the product with r, as the bias of x^n is here.

Each step asks for the one before: it is for texts that are short and many, such as sentences.
"""

import torch

from .precision import without_autocast


def recurrent_gru(gates: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """h_1, ..., h_T [units, texts, length, dim], from h_0 = 0, of several units at once.

    gates [units, texts, length, 3 * dim]: x^r, x^z and x^n; weight [units, 3 * dim, dim]: U_r, U_z, U_n over one
    another; bias [units, 1, 3 * dim]. States are float32 at least; the answer is in the type of the gates.
    """
    dim, wide = weight.shape[-1], torch.promote_types(gates.dtype, torch.float32)
    weight, bias, answers = weight.transpose(1, 2).to(wide), bias.to(wide), []
    state = torch.zeros(*gates.shape[:2], dim, dtype=wide, device=gates.device)
    with without_autocast(gates):
        for step in gates.to(wide).unbind(2):
            asked = torch.baddbmm(bias, state, weight)
            reset, update = (step[..., : 2 * dim] + asked[..., : 2 * dim]).sigmoid_().chunk(2, dim=-1)
            new = torch.addcmul(step[..., 2 * dim :], reset, asked[..., 2 * dim :]).tanh_()
            state = torch.lerp(new, state, update)
            answers.append(state)
        return torch.stack(answers, dim=2).to(gates.dtype)


def reversal(real: torch.Tensor) -> torch.Tensor:
    """[texts, length] for each place, counted over all texts, the one whose token it takes when left-aligned texts are
    read backwards; padding stays. Done twice it changes nothing.

    `real` [texts, length] says which places are of the text.
    """
    place = torch.arange(real.shape[1], device=real.device)
    turned = torch.where(real, real.sum(dim=1, keepdim=True) - 1 - place, place)
    return turned + torch.arange(real.shape[0], device=real.device)[:, None] * real.shape[1]
