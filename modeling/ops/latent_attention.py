"""Attention to keys and values that are made of one latent vector per token (DeepSeek-AI, 2024, arXiv:2405.04434,
section 2.1), in two forms with the same answer.

    k_h = [U_h c, r]   v_h = V_h c   score = q_h . k_h

c is a token's latent, U_h and V_h are the matrices of head h, and r is a rotated key that all heads share. Expanded,
all keys and values are made and attention is that of any other model, quickest where many queries ask. Absorbed, the
matrices go to the other side of the products: q_h is [q, p], and q . U_h c = (U_h^T q) . c, so that all heads ask one
key, the latent itself, and V_h is applied to what they read of it. Nothing is made of the keys.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def expanded_latent_attention(
    kernel: Callable, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_rope: torch.Tensor, mask
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """kernel(query, key, value, mask), all [batch, heads, tokens, dim] and of one width: where widths differ, torch's
    fused attention turns to one that writes all pairs down.

    query [batch, queries, heads, nope + rope]; key [batch, keys, heads, nope] and value [batch, keys, heads, dim], made
    of latents; key_rope [batch, keys, rope]. Answers ([batch, queries, heads, dim], weights or None).
    """
    dim, shared = value.shape[-1], key_rope[:, :, None].expand(*key.shape[:-1], -1)
    tensors = query, torch.cat((key, shared), dim=-1), value
    width = max(tensor.shape[-1] for tensor in tensors)
    output, weights = kernel(*(F.pad(x, (0, width - x.shape[-1])).transpose(1, 2) for x in tensors), mask)
    return output[..., :dim], weights


def absorbed_latent_attention(
    query: torch.Tensor,
    latent: torch.Tensor,
    key_rope: torch.Tensor,
    to_key: torch.Tensor,
    to_value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the latents [batch, keys, rank] themselves; to_key [heads, nope, rank], to_value [heads, dim, rank].

    mask [batch or 1, 1, queries, keys]: True, or 0 in a mask that is added, where a query sees. None, as torch's causal
    attention: a single query sees all; several are the first of the keys, and see none after themselves. Answers
    ([batch, queries, heads, dim], weights [batch, heads, queries, keys]).
    """
    batch, queries, heads, _ = query.shape
    nope, rope = query.split((to_key.shape[1], key_rope.shape[-1]), dim=-1)
    asked = by_head(nope, to_key).flatten(1, 2)  # [batch, queries * heads, rank]
    scores = torch.bmm(asked * scale, latent.transpose(1, 2))
    scores = torch.baddbmm(scores, rope.flatten(1, 2), key_rope.transpose(1, 2), alpha=scale)
    scores = masked(scores.unflatten(1, (queries, heads)), mask)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(latent.dtype)
    read = torch.bmm(weights.flatten(1, 2), latent).unflatten(1, (queries, heads))
    return by_head(read, to_value.transpose(1, 2)), weights.transpose(1, 2)


def by_head(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """x [batch, queries, heads, in], each head by its matrix [heads, in, out]."""
    answer = torch.bmm(x.flatten(0, 1).transpose(0, 1), matrices)
    return answer.transpose(0, 1).unflatten(0, x.shape[:2])


def masked(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """scores [batch, queries, heads, keys] with those out that the mask hides."""
    queries, keys = scores.shape[1], scores.shape[-1]
    if mask is None:
        if queries == 1:
            return scores
        mask = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril()[None, None]
    mask = mask[..., :keys].transpose(1, 2)
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask


def absorbing_is_less_work(queries: int, keys: int, nope: int, dim: int) -> bool:
    """Whether few enough queries ask of more keys than their own. Then the absorbed form's products with latents, 2
    rank for each pair, are no more than what keys and values are made by, rank (nope + dim) for each key, and its
    scores are at most half as many numbers."""
    return queries < keys and 2 * queries <= nope + dim
