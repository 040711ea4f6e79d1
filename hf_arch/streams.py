"""Training on long streams: a model with a bounded memory carries it from one batch to the next.

`Segments` lays documents out so that row b of batch k + 1 goes on where row b of batch k ended. `StatefulTrainer` is
transformers' Trainer that hands each batch the memory of the one before it, detached, so that backpropagation is
truncated at the segment (Williams and Peng, 1990; Dai et al., 2019, arXiv:1901.02860, section 3.2).
"""

import heapq
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, default_data_collator
from transformers.cache_utils import Cache, DynamicLayer

from hf_arch.modeling.layers.cache import HistoryCacheLayer
from hf_arch.modeling.layers.chosen_cache import ChosenCacheLayer
from hf_arch.states import pack, read, unpack, write


class Segments(Dataset):
    """Documents as `rows` streams of segments of `length` tokens, each with the tokens that follow as its labels.

    documents: token ids of each text, or mappings with them under "input_ids"; each goes whole into the stream that is
    shortest so far, in the order given. rows: those of a batch, all processes together, which is
    `arguments.train_batch_size * arguments.world_size` for training. Item k * rows + b is segment k of stream b:

        {"input_ids", "labels", "attention_mask", "position_ids"}, each a list of `length` numbers

    where position_ids count from the start of the document. The end of a document is padded to a whole segment, so that
    a segment holds one document; a stream that ends before the others is filled up with segments without labels.
    """

    def __init__(self, documents: Sequence, length: int, rows: int):
        if length < 1 or rows < 1:
            raise ValueError(f"length and rows are at least 1, not {length} and {rows}.")
        self.documents, self.length, self.rows = documents, length, rows
        self.streams: list[list[int]] = [[] for _ in range(rows)]  # documents of each stream
        sizes: list[list[int]] = [[] for _ in range(rows)]  # and their numbers of segments
        shortest = [(0, row) for row in range(rows)]
        for number in range(len(documents)):
            size = -(-(len(self.tokens(number)) - 1) // length)  # the last token has nothing to predict
            if size > 0:
                total, row = shortest[0]
                heapq.heapreplace(shortest, (total + size, row))
                self.streams[row].append(number)
                sizes[row].append(size)
        self.ends = [list(accumulate(of_row)) for of_row in sizes]
        self.count = max((ends[-1] for ends in self.ends if ends), default=0)
        if not self.count:
            raise ValueError("There is nothing to learn: no document has two tokens.")

    def tokens(self, number: int) -> Sequence[int]:
        document = self.documents[number]
        return document["input_ids"] if isinstance(document, Mapping) else document

    def __len__(self) -> int:
        return self.count * self.rows

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place, row = divmod(index, self.rows)
        which = bisect_right(self.ends[row], place)
        if which == len(self.ends[row]):
            return self.padded([0], [-100], 0)
        start = (place - (self.ends[row][which - 1] if which else 0)) * self.length
        tokens = list(map(int, self.tokens(self.streams[row][which])[start : start + self.length + 1]))
        return self.padded(tokens[:-1], tokens[1:], start)

    def padded(self, tokens: list[int], labels: list[int], start: int) -> dict[str, list[int]]:
        more = self.length - len(tokens)
        return {
            "input_ids": tokens + [tokens[-1]] * more,
            "labels": labels + [-100] * more,
            "attention_mask": [1] * len(tokens) + [0] * more,
            "position_ids": list(range(start, start + self.length)),
        }


def collate_segments(segments: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch of items of `Segments`; the tokens that follow are told as `shift_labels`, since a loss that shifts the
    labels itself would leave out the last of each segment."""
    batch = default_data_collator(segments)
    batch["shift_labels"] = batch["labels"]
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


class Memory:
    """What the rows of the last batch have read: a cache, and which of its columns each row may see."""

    def __init__(self):
        self.cache: Cache | None = None
        self.seen = torch.ones(0, 0, dtype=torch.bool)  # [rows, columns]

    def tell(self, inputs: dict[str, torch.Tensor], model: nn.Module) -> dict:
        """A batch with what its rows have read before. Rows whose positions start at 0 have read nothing."""
        tokens, positions = inputs["input_ids"], inputs.get("position_ids")
        real = inputs.get("attention_mask")
        real = torch.ones_like(tokens, dtype=torch.bool) if real is None else real.bool()
        start = torch.ones_like(real[:, 0]) if positions is None else positions[:, 0] == 0
        if start.all():
            self.cache, self.seen = empty_memory(model), real[:, :0]
        elif self.cache is None or len(self.seen) != len(tokens):
            raise ValueError(
                f"The {len(tokens)} rows of this batch go on, but the memory is of {len(self.seen)} rows. Lay the "
                "documents out by hf_arch.Segments with the rows of a batch; when resuming, take the checkpoint of a "
                "StatefulTrainer with as many processes, or ignore_data_skip=True to start from the first segments."
            )
        elif start.any():
            self.forget(start)
        self.seen = torch.cat((self.seen, real), dim=1)
        mask = None if self.seen.all() else self.seen
        return {**inputs, "past_key_values": self.cache, "attention_mask": mask}

    def forget(self, rows: torch.Tensor) -> None:
        """Rows [batch] that start anew: they no longer see what is there, and recurrences lose their states. Columns
        that no row sees are counted no longer, beyond those that a window holds."""
        self.seen = self.seen & ~rows[:, None]
        for layer in self.cache.layers:
            if hasattr(layer, "forget"):
                layer.forget(rows)
        unseen = int((self.seen.any(dim=0).cumsum(0) == 0).sum())
        held = max(0, *(layer.get_max_length() for layer in self.cache.layers))
        unseen = max(0, min(unseen, self.seen.shape[1] - held))
        self.seen = self.seen[:, unseen:]
        for layer in self.cache.layers:
            layer.cumulative_length -= unseen

    def detach(self) -> None:
        """Cut what the next batch is told from the graph of this one."""
        for layer in self.cache.layers:
            for held in (vars(layer), getattr(layer, "states", {})):
                held.update({name: value.detach() for name, value in held.items() if isinstance(value, torch.Tensor)})

    def save(self, path: Path) -> None:
        if self.cache is not None:
            tensors, description = pack(self.cache)
            write(path, tensors | {"seen": self.seen}, {"cache": description})

    def load(self, path: Path, device: torch.device) -> None:
        tensors, about = read(path)
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        self.seen, self.cache = tensors.pop("seen"), unpack(tensors, about["cache"])


def empty_memory(model: nn.Module) -> Cache:
    """The cache of a model, wrapped or not, that holds nothing yet. Raises ValueError for one without bounds."""
    backbones = [module for module in model.modules() if hasattr(module, "make_cache")]
    if len(backbones) != 1:
        raise ValueError(
            f"A {type(model).__name__} is no decoder of hf_arch, alone: it has no memory that a trainer could carry."
        )
    backbone = backbones[0]
    cache = backbone.make_cache()
    full = (isinstance(layer, DynamicLayer) and not layer.is_sliding for layer in cache.layers)
    if any(full) or any(isinstance(layer, (HistoryCacheLayer, ChosenCacheLayer)) for layer in cache.layers):
        raise ValueError(
            f"{backbone.config.model_type} with layers of type {', '.join(dict.fromkeys(backbone.config.layer_types))} "
            "remembers everything: its memory would grow with the stream. Take layers with a bounded one, recurrent or "
            "sliding, or transformers' own Trainer."
        )
    return cache


class StatefulTrainer(Trainer):
    """A Trainer whose batches go on where those before them ended.

    `train_dataset` and `eval_dataset` are `Segments`. The memory is carried over accumulated batches, steps and, in
    each process, its own rows; saved with a checkpoint and restored on resume. Evaluation has a memory of its own.
    """

    def __init__(self, model=None, args=None, data_collator=collate_segments, *others, **options):
        super().__init__(model, args, data_collator, *others, **options)
        if self.args.n_gpu > 1:
            raise ValueError("Several GPUs in one process share rows out anew: start one process each, by torchrun.")
        self.memories = {True: Memory(), False: Memory()}  # of training, of evaluation

    def _get_dataloader(self, dataset, description, batch_size, sampler_fn=None, **options):
        rows = batch_size * self.args.world_size
        if not isinstance(dataset, Segments):
            raise TypeError(f"{description}: a StatefulTrainer takes hf_arch.Segments, not a {type(dataset).__name__}.")
        if dataset.rows != rows:
            raise ValueError(
                f"{description}: Segments(..., rows={dataset.rows}), but a batch has {batch_size} rows in each of "
                f"{self.args.world_size} processes: give rows={rows}."
            )
        return super()._get_dataloader(dataset, description, batch_size, SequentialSampler, **options)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        memory = self.memories[model.training]
        told = memory.tell(inputs, self.model)
        loss, outputs = super().compute_loss(model, told, True, num_items_in_batch)
        memory.detach()
        return (loss, outputs) if return_outputs else loss

    def memory_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"memory-{self.args.process_index}.safetensors"

    def _save_rng_state(self, output_dir):
        """The memory is kept where each process keeps its random state."""
        super()._save_rng_state(output_dir)
        self.memories[True].save(self.memory_file(output_dir))

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and self.memory_file(checkpoint).exists():
            self.memories[True].load(self.memory_file(checkpoint), self.args.device)
