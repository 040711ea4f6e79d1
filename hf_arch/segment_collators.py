"""Batches of texts in segments (`ArchHatProcessor`), of which tokens and whole segments are hidden."""

from dataclasses import dataclass

import torch
from transformers.processing_utils import ProcessorMixin


@dataclass
class SentenceMaskCollator:
    """Hides tokens and whole segments, for heads `ForPreTraining`: what BERT does (arXiv:1810.04805, section 3.1), and
    SMITH with blocks of sentences (Yang et al., 2020, arXiv:2004.12297).

    Items are what the processor says of a text. `sentence_probability` of the segments are hidden, one at least of each
    text that has two: the mask takes the place of all their tokens but the leader, and `hidden_segments` is 1 at that.
    Of the other tokens, special ones aside, `mlm_probability` are to be named by `labels`; of these 80 % are masked, 10
    % replaced at random, and 10 % left. `original_ids` are the tokens before that. Images and videos stay, and their
    segments do not count. Draws follow torch's generator.
    """

    processor: ProcessorMixin
    mlm_probability: float = 0.15
    sentence_probability: float = 0.15
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        if self.processor.tokenizer.mask_token_id is None:
            raise ValueError("The tokenizer has no mask_token to hide tokens behind.")
        for name in ("mlm_probability", "sentence_probability"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: a share lies from 0 to below 1.")

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        names = self.processor.model_input_names
        items = [{name: item[name] for name in names if name in item} for item in items]  # not all have images
        told = self.processor.pad(items, pad_to_multiple_of=self.pad_to_multiple_of, return_tensors="pt")
        ids, starts, real = told["input_ids"], told["segment_starts"] > 0, told["attention_mask"] > 0
        leaders = starts & real
        # The segment of a token is that of the last leader at or before it
        column = torch.arange(ids.shape[1]).expand_as(ids)
        last = torch.where(leaders, column, 0).cummax(dim=1).values
        patches = self.of_patches(ids) & real
        of_pixels = torch.zeros_like(ids).scatter_reduce(1, last, patches.to(ids.dtype), "amax") > 0
        hidden_leaders = self.hidden_segments(leaders & ~of_pixels)
        inside = hidden_leaders.gather(1, last) & real & ~leaders
        special = torch.isin(ids, torch.tensor(self.processor.tokenizer.all_special_ids)) | patches
        named = (torch.rand(ids.shape) < self.mlm_probability) & real & ~leaders & ~inside & ~special
        return dict(told) | {
            "input_ids": self.masked(ids, named).masked_fill(inside, self.processor.tokenizer.mask_token_id),
            "labels": torch.where(named, ids, -100),
            "original_ids": ids,
            "hidden_segments": hidden_leaders.long(),
        }

    def hidden_segments(self, leaders: torch.Tensor) -> torch.Tensor:
        """Which leaders [batch, length] are of hidden segments: never all of a text."""
        draws = torch.where(leaders, torch.rand(leaders.shape), 2.0)
        counts = leaders.sum(dim=1, keepdim=True)
        least = draws == draws.min(dim=1, keepdim=True).values
        most = draws == torch.where(leaders, draws, -1.0).max(dim=1, keepdim=True).values
        return ((draws < self.sentence_probability) | least) & ~most & leaders & (counts > 1)

    def of_patches(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.isin(ids, torch.tensor([*self.processor.placeholders.values()], dtype=ids.dtype))

    def masked(self, ids: torch.Tensor, named: torch.Tensor) -> torch.Tensor:
        tokenizer, draws = self.processor.tokenizer, torch.rand(ids.shape)
        ids = ids.masked_fill(named & (draws < 0.8), tokenizer.mask_token_id)
        others = torch.randint(len(tokenizer), ids.shape)
        others = others.masked_fill(self.of_patches(others), tokenizer.mask_token_id)  # which no token may become
        return torch.where(named & (draws >= 0.9), others, ids)
