"""MegaByte (Yu et al., 2023, arXiv:2305.07185): a model of patches tells a small one, of bytes, what to write next.

In the paper, patch k of a text y_0, y_1, ... is written knowing that the patches before it are complete: the global
model reads a learned item and then patches, and answers item k with a vector for each of the P bytes to come; the local
model reads this answer beside the byte before, at the first of a patch a learned start in its place.

Here logits at a position name the next token. That is the same model of the text that follows its first token: with
x_0, y_0 = x_1, ..., the byte y_t is written at the place of x_t. So a patch of the global model ends with each place
that is a multiple of P, the first one with x_0 after learned bytes, as of a text that began before; and the places from
there on are those of the local model's patch. If all texts begin with the same token, its embedding and those bytes are
the paper's learned item, and nothing else differs. The byte that ends a patch is told to the local model by the answer
alone, which makes the first byte of each patch know all that was read.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from ...layers.attention import Attention
from ...layers.level import Level, RowStates
from ...layers.norm import RMSNorm
from ...layers.patch_attention import PatchAttention
from ...layers.positions import LearnedPositions, NoPositions, RotaryEmbedding
from ...ops.firing import Fired, last_of
from ...skeleton.classifiers import QuestionAnswering, SequenceClassification, TokenClassification
from ...skeleton.heads import CausalLM
from ...skeleton.hierarchy import Hierarchy, Resampling
from .configuration_megabyte import ArchMegaByteConfig

LAST_POSITIONS = {"rope": RotaryEmbedding, "learned": LearnedPositions}


class MegaByteResampling(Resampling):
    """x'_g = the items of a patch side by side, y = (x, or a learned start at the first place of a patch) + W answer_p,
    the p-th part of the answer to the patch before.

    An item [own size + those of the levels above] is what its level reads, and what those above will read of it. Before
    a text there is, for the last level, what is learned; others begin with the learned start.
    """

    def __init__(self, config: ArchMegaByteConfig, level: int):
        super().__init__(config, level)
        self.patch_size, self.size = config.patch_sizes[level], config.level_sizes[level]
        self.parts = [config.bytes_of(level) * size for size in config.byte_sizes[level + 1 :]]
        above = config.level_sizes[level + 1]
        self.answer_norm = RMSNorm(above, config.norm_eps)
        self.answer_proj = nn.Linear(above // self.patch_size, self.size, bias=False)
        self.start = nn.Parameter(torch.empty(self.size))
        self.before_text = nn.Parameter(torch.empty(self.patch_size - 1, self.parts[-1]))

    def init_parameters(self, std: float) -> None:
        init.normal_(self.start, std=std)
        init.normal_(self.before_text, std=std)

    def most(self, length: int) -> int:
        return -(-length // self.patch_size)

    def fire(self, stream, level: Level, kept: RowStates | None):
        """The last items of patches. With it, what levels above read of all items, and of as many before as the first
        patch can have."""
        fires = level.place % self.patch_size == 0
        if level.real is not None:
            fires = fires & level.real
        before = F.pad(self.before_text.to(stream.dtype), (sum(self.parts[:-1]), 0)).expand(stream.shape[0], -1, -1)
        held = None if kept is None else kept.read("items")
        if held is not None:
            before = torch.where(level.place[:, :1, None] == 0, before, held.to(stream.dtype))
        around = torch.cat((before, stream[..., self.size :]), dim=1)
        if kept is not None:
            kept.write(0, items=last_of(around, self.patch_size - 1, level.real))
        return fires.expand(stream.shape[:2]), around

    def shorten(self, stream, fired: Fired, around: torch.Tensor, level: Level, kept):
        index = fired.rows.index
        if level.before is None:  # patches lie side by side
            patches = around[:, : index.shape[1] * self.patch_size].unflatten(1, (-1, self.patch_size))
        else:
            first = index // stream.shape[1] * around.shape[1] + index % stream.shape[1]
            index = first[..., None] + torch.arange(self.patch_size, device=first.device)
            patches = around.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, -1)
        parts = [part.flatten(-2) for part in patches.split(self.parts, dim=-1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def expand(self, stream, answer, fired: Fired, around, level: Level, kept: RowStates | None):
        place, made = level.place % self.patch_size, None
        if answer is not None:
            made = self.answer_proj(self.answer_norm(answer).unflatten(-1, (self.patch_size, -1)))
        held = None if kept is None else kept.read("answer")
        if level.before is None:
            told = made.flatten(1, 2)[:, : stream.shape[1]]
        else:
            held = held.to(stream.dtype)
            told = fired.spread(made, held, place)
        if kept is not None:
            kept.write(0, answer=fired.last(made, held))
        own = stream[..., : self.size]
        return torch.where(place[..., None] == 0, self.start.to(stream.dtype), own) + told


class ArchMegaByteModel(Hierarchy):
    config: ArchMegaByteConfig
    resampling = MegaByteResampling
    mixers = {
        "ragged_attention": Attention,
        "patch_attention": PatchAttention,
    }

    def make_embedding(self) -> nn.Module:
        """Of bytes as all levels read them, side by side."""
        return nn.Embedding(self.config.vocab_size, sum(self.config.byte_sizes), self.config.pad_token_id)

    def make_positions(self, level: int) -> nn.Module:
        last = level == self.config.num_levels - 1
        kind = LAST_POSITIONS[self.config.position_type] if last else NoPositions
        return kind(self.config.at_level(level))


class ArchMegaByteForCausalLM(CausalLM):
    """A head that names the next byte.

    ```python
    >>> import torch
    >>> from transformers import ByT5Tokenizer
    >>> from hf_arch.modeling.hierarchical.megabyte.configuration_megabyte import ArchMegaByteConfig
    >>> from hf_arch.modeling.hierarchical.megabyte.modeling_megabyte import ArchMegaByteForCausalLM

    >>> tokenizer = ByT5Tokenizer()  # bytes need no files
    >>> model = ArchMegaByteForCausalLM(ArchMegaByteConfig(hidden_size=64, num_hidden_layers=3))
    >>> text = tokenizer("naïve", add_special_tokens=False, return_tensors="pt")
    >>> text.input_ids.shape  # a byte and two of ï, each moved past three special tokens
    torch.Size([1, 6])
    >>> answer = model.generate(**text, max_new_tokens=8, eos_token_id=None)
    >>> answer.shape
    torch.Size([1, 14])
    >>> isinstance(tokenizer.decode(answer[0]), str)
    True

    ```
    """

    config: ArchMegaByteConfig
    backbone = ArchMegaByteModel


class ArchMegaByteForSequenceClassification(SequenceClassification):
    config: ArchMegaByteConfig
    backbone = ArchMegaByteModel


class ArchMegaByteForTokenClassification(TokenClassification):
    config: ArchMegaByteConfig
    backbone = ArchMegaByteModel


class ArchMegaByteForQuestionAnswering(QuestionAnswering):
    config: ArchMegaByteConfig
    backbone = ArchMegaByteModel
