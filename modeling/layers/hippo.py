"""How state spaces begin: the matrices that remember a text by its Legendre polynomials (HiPPO-LegS, Gu et al., 2020,
arXiv:2008.07669), and diagonal ones that are like them (Gu et al., 2022, arXiv:2206.11893, section 4)."""

import math

import torch


def hippo_legs(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [size, size] and B [size] of HiPPO-LegS, in float64 (arXiv:2111.00396, equation 2)."""
    root = (2 * torch.arange(size, dtype=torch.float64, device="cpu") + 1).sqrt()
    A = (root[:, None] * root).tril(-1) + torch.diag(torch.arange(1.0, size + 1, dtype=torch.float64, device="cpu"))
    return -A, root


def low_rank_legs(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(diagonal, P, B) [size / 2] complex: one of each pair of conjugates, for which HiPPO-LegS is
    V (diagonal - P P^*) V^* (arXiv:2111.00396, theorem 1 and appendix C.1)."""
    A, B = hippo_legs(size)
    P = (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5).sqrt()
    normal = A + P[:, None] * P  # -1/2 on the diagonal and skew-symmetric beside it
    frequency, V = torch.linalg.eigh(-1j * normal)
    half = slice(size // 2, None)  # ascending: the positive ones
    V = V[:, half]
    return torch.complex(torch.full_like(frequency[half], -0.5), frequency[half]), V.mH @ P.to(V), V.mH @ B.to(V)


def diagonal_lin(states: int) -> tuple[torch.Tensor, torch.Tensor]:
    """S4D-Lin: -1/2 + i pi n."""
    order = torch.arange(states, dtype=torch.float64, device="cpu")
    return torch.complex(torch.full_like(order, -0.5), math.pi * order), torch.ones_like(order)


def diagonal_inv(states: int) -> tuple[torch.Tensor, torch.Tensor]:
    """S4D-Inv: -1/2 + i size/pi (size/(2n + 1) - 1), of size = 2 * states."""
    order, size = torch.arange(states, dtype=torch.float64, device="cpu"), 2 * states
    frequency = size / math.pi * (size / (2 * order + 1) - 1)
    return torch.complex(torch.full_like(order, -0.5), frequency), torch.ones_like(order)


def diagonal_legs(states: int) -> tuple[torch.Tensor, torch.Tensor]:
    """S4D-LegS: that of HiPPO-LegS without its low rank, with its B."""
    diagonal, _, B = low_rank_legs(2 * states)
    return diagonal, B


def diagonal_real(states: int) -> tuple[torch.Tensor, torch.Tensor]:
    """S4D-Real: -(n + 1)."""
    order = torch.arange(states, dtype=torch.float64, device="cpu")
    return torch.complex(-(order + 1), torch.zeros_like(order)), torch.ones_like(order)


DIAGONALS = {"lin": diagonal_lin, "inv": diagonal_inv, "legs": diagonal_legs, "real": diagonal_real}
