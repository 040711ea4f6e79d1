"""Images and videos in a text of segments (`segments.py`): patches of pixels in the places of placeholder tokens.

An image is a segment of level 0: its leader, and a placeholder for each patch, row by row. So is a frame of a video.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .levels import Rows
from .pixel_inputs import MODALITIES


def patches_of(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """[..., channels, height, width] -> [patches, channels * size * size]: of one image after another, row by row."""
    cut = pixels.flatten(0, -4).unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)


class ModalityEmbedding(nn.Module):
    """x + a vector for the modality of each segment (text, image, video), where x is a linear map of a patch's pixels
    in the place of a placeholder (Dosovitskiy et al., 2021, arXiv:2010.11929, equation 1). Text is number 0, the others
    follow in the order of `MODALITIES`."""

    def __init__(self, config):
        super().__init__()
        self.placeholders = (config.image_token_id, config.video_token_id)
        self.shape, self.patch_size = (config.num_channels, config.image_size, config.image_size), config.patch_size
        self.num_patches = config.num_patches
        self.patch_proj = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        self.modalities = nn.Embedding(1 + len(MODALITIES), config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, kinds: torch.Tensor, members: Rows, pixels: Sequence[torch.Tensor | None]
    ) -> torch.Tensor:
        """
        hidden_states: [batch, length, size], of the tokens.
        kinds: [batch, length or more] the modality whose placeholder each token is, 0 where it is none. What is more
            are columns before the tokens that `members` know of.
        pixels: of each modality [..., channels, height, width], in the order of its placeholders, or None.

        Raises ValueError where pixels and placeholders do not fit.
        """
        rows, length = members.unpack(kinds), hidden_states.shape[1]
        self.check(rows, members.real, pixels)
        nothing = torch.zeros_like(kinds)
        kinds = members.repack_into(nothing, rows)[:, -length:]  # without what padding holds
        for number, (images, token) in enumerate(zip(pixels, self.placeholders, strict=True), start=1):
            if token is not None:
                patches = self.patch_proj(self.cut(images, like=hidden_states)).to(hidden_states.dtype)
                hidden_states = hidden_states.masked_scatter((kinds == number)[..., None], patches)
        shown = rows.amax(dim=1, keepdim=True).expand_as(rows)
        return hidden_states + self.modalities(members.repack_into(nothing, shown)[:, -length:])

    def cut(self, images: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        """Patches; of no images none, so that their parameters have a gradient in every process."""
        if images is None:
            return like.new_zeros(0, self.patch_proj.in_features)
        return patches_of(images.to(like), self.patch_size)

    def kinds_of(self, tokens: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """[batch, length] of token ids, or of embeddings that are those of the vocabulary's `table`."""
        kinds = torch.zeros(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        for number, token in enumerate(self.placeholders, start=1):
            if token is not None:
                same = tokens == token if tokens.ndim == 2 else (tokens == table[token].to(tokens.dtype)).all(dim=-1)
                kinds = kinds.masked_fill(same, number)
        return kinds

    def check(self, rows: torch.Tensor, real: torch.Tensor | None, pixels: Sequence[torch.Tensor | None]) -> None:
        """Also looks at values that are on a GPU: there, what does not fit would be an error that says nothing."""
        for (modality, name), images, token in zip(MODALITIES.items(), pixels, self.placeholders, strict=True):
            if images is not None and token is None:
                raise ValueError(f"{name} are told to a model whose config has no {modality}_token_id.")
            if images is not None and (images.ndim not in (4, 5) or images.shape[-3:] != self.shape):
                raise ValueError(
                    f"{name} are {list(images.shape)}; the model reads images of {list(self.shape)}, channels, height "
                    "and width."
                )
        if torch.compiler.is_compiling() or rows.is_meta:
            return
        for number, ((modality, name), images) in enumerate(zip(MODALITIES.items(), pixels, strict=True), start=1):
            found, told = int((rows == number).sum()), 0 if images is None else images[..., 0, 0, 0].numel()
            if found != told * self.num_patches:
                raise ValueError(
                    f"The text holds {found} {modality} tokens, and {name} {told} images of {self.num_patches} "
                    "patches: one token for each patch."
                )
        shown = rows.amax(dim=1) > 0
        length = torch.full_like(shown, rows.shape[1], dtype=torch.long) if real is None else real.sum(dim=1)
        patches = (rows[:, 1:] == rows.amax(dim=1, keepdim=True)).sum(dim=1)
        if (shown & ((patches != self.num_patches) | (length != 1 + self.num_patches) | (rows[:, 0] > 0))).any():
            raise ValueError(
                f"An image is a segment of its own, a leader and {self.num_patches} placeholders; segment_starts says "
                "where segments begin. The processor marks them."
            )
