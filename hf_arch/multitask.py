"""Many tasks on one base: models that hold the same weights, and one that learns all of its tasks together.

models = {name: auto.from_pretrained("base", **labels) for name, (auto, labels) in heads.items()}
hf_arch.share_weights(models.values())  # in memory once; an adapter of PEFT around each is its own
trainer = Trainer(
    hf_arch.MultiTaskModel(models),
    TrainingArguments(folder, per_device_train_batch_size=1, remove_unused_columns=False),
    train_dataset=(batches := hf_arch.TaskBatches(features, collators, batch_size=16)),
    data_collator=batches.collate,
)
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.data import Dataset


def share_weights(models: Iterable[nn.Module], adapter: str | None = None) -> None:
    """Let all models hold the parameters of the first one's base: in memory once, and trained together where they are
    trained. Heads stay their own, and so do adapters of PEFT, which may be around some of the models, or inside.

    adapter: share the weights of the adapter that all have under this name instead. Raises ValueError where they
    differ. Models keep modules of their own, so that each uses its active adapter, whatever the others do.
    """
    bases = [getattr(model, "get_base_model", lambda model=model: model)() for model in models]
    first, *others = [weights(model.base_model, adapter) for model in bases]
    for model, named in zip(bases[1:], others, strict=True):
        if not first or {plain: x.shape for plain, (_, x) in first.items()} != {
            plain: x.shape for plain, (_, x) in named.items()
        }:
            what = f"adapters {adapter!r}" if adapter else "bases"
            raise ValueError(f"The {what} of {type(bases[0]).__name__} and {type(model).__name__} are not alike.")
        shared = {name: first[plain][1] for plain, (name, _) in named.items()}
        model.base_model.load_state_dict(shared, assign=True, strict=False)
        model.tie_weights()  # of a head that names tokens by their embeddings


def weights(base: nn.Module, adapter: str | None) -> dict[str, tuple[str, torch.Tensor]]:
    """Those of a base itself, or of its adapter: by the name that they have where nothing is adapted, the one that they
    have here, and the tensor."""
    of_adapters = {
        f"{name}.{own}"
        for name, module in base.named_modules()
        if isinstance(module, BaseTunerLayer)
        for own in module.state_dict()
        if not own.startswith("base_layer.")
    }
    return {
        ".".join(part for part in name.split(".") if part != "base_layer"): (name, tensor)
        for name, tensor in base.state_dict(keep_vars=True).items()
        if (name in of_adapters and f".{adapter}." in f"{name}." if adapter else name not in of_adapters)
    }


class MultiTaskModel(nn.Module):
    """Models of one base, by the names of their tasks, for a Trainer: `model(task=name, **inputs)` is what the one of
    that name says. Their bases share weights from here on. Each stays a model of its own, to be saved and used alone.

    adapter: as in `share_weights`; what is trained is then this adapter and the heads, made active here.
    """

    accepts_loss_kwargs = False  # the batches of a step may be of several tasks: each loss is a mean of its own

    def __init__(self, models: Mapping[str, nn.Module], adapter: str | None = None):
        super().__init__()
        share_weights(models.values())
        if adapter is not None:
            share_weights(models.values(), adapter)
            for model in models.values():
                model.set_adapter(adapter)
        self.tasks = nn.ModuleDict(models)

    def forward(self, task: str, **inputs):
        if task not in self.tasks:
            raise ValueError(f"There is no task {task!r}; there are {', '.join(self.tasks)}.")
        return self.tasks[task](**inputs)


class TaskBatches(Dataset):
    """Batches of `batch_size` features of one task each, for a Trainer with one item to a batch and `collate` as its
    collator: item k is {"task": name, **batch}.

    features: of each task its items; collators: what makes a batch of them. A task has its share of the batches by the
    number of its items, of which at most `limit` are taken, so that none is drowned by a large one (Raffel et al.,
    2020, arXiv:1910.10683, section 3.5.2). `seed` fixes which items meet.
    """

    def __init__(
        self,
        features: Mapping[str, Sequence],
        collators: Mapping[str, Callable[[list], dict[str, torch.Tensor]]],
        batch_size: int,
        limit: int | None = None,
        seed: int = 0,
    ):
        if empty := [name for name, items in features.items() if not len(items)]:
            raise ValueError(f"There is nothing to learn for {', '.join(empty)}.")
        self.features, self.collators = features, collators
        self.batches: list[tuple[str, list[int]]] = []
        draw = random.Random(seed)
        for name, items in features.items():
            order = draw.sample(range(len(items)), min(len(items), limit or len(items)))
            self.batches += [(name, order[i : i + batch_size]) for i in range(0, len(order), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict:
        name, places = self.batches[number]
        return {"task": name, **self.collators[name]([self.features[name][place] for place in places])}

    @staticmethod
    def collate(items: list[dict]) -> dict:
        if len(items) > 1:
            raise ValueError("An item is a batch already: give the Trainer's arguments per_device_train_batch_size=1.")
        return items[0]
