"""New mixers, fitted to what the attention that they replace answers (MOHAWK: Bick et al., 2024, arXiv:2408.10189,
section 4.2; attention transfer: LoLCATs, Zhang et al., 2024, arXiv:2410.10254, section 3.2)."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import EvalPrediction, PreTrainedModel, Trainer

from hf_arch.modeling.skeleton.backbone import Backbone
from hf_arch.modeling.state_space.hybrid.configuration_hybrid import ArchHybridConfig
from hf_arch.remake.upcycle import as_ours


class MixerTrainer(Trainer):
    """A Trainer of the mixers of `model` that differ from those of `teacher`, and of nothing else. Example:

        student = hf_arch.uptrain(llama, "retention")
        trainer = hf_arch.MixerTrainer(student, arguments, teacher=llama, train_dataset=dataset)
        trainer.train()
        print(trainer.evaluate(held_out))  # eval_loss, and eval_layer_<i>

    Each new mixer is given what the attention of its layer is given in the teacher, and is to answer what it answers:
    one pass of the teacher, all layers side by side, and no pass through the rest of the student. The loss of a layer
    is the sum of squared differences over that of the answers' squares, of real tokens: 0 is as the attention, 1 as if
    nothing was answered; the whole loss is the mean over layers, `eval_layer_<i>` that of one.

    `teacher` is what `hf_arch.uptrain` was given, `model` what it made of it. Batches are what both read; labels are
    not looked at. Raises ValueError where the two are not layer by layer of the same sizes, where no mixer differs, for
    adapters, and where parameters are dealt out by the layer, since no layer is called as a whole: several processes
    each have the model, by `accelerate launch`.
    """

    def __init__(self, model: PreTrainedModel, *args, teacher: PreTrainedModel, **options):
        options.setdefault("compute_metrics", self.errors_by_layer)
        self.teacher = as_ours(teacher).eval()
        self.layers = replaced_layers(as_ours(model), self.teacher)
        super().__init__(model, *args, **options)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.n_gpu > 1:
            raise ValueError(
                "Mixers are fitted with a whole model in each process: leave fsdp and deepspeed out, and start several "
                "processes with accelerate launch."
            )
        self.teacher.to(self.args.device)
        if self.args.ddp_find_unused_parameters is None:
            self.args.ddp_find_unused_parameters = False  # those of all mixers are used, not by what the model answers
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch, made here

    def train(self, *args, **options):
        with only_trainable(self.model, [layer.mixer for layer in self.new_layers()]):
            return super().train(*args, **options)

    def new_layers(self) -> list[nn.Module]:
        return [self.model.base_model.layers[self.model.config.layer_groups[layer]] for layer in self.layers]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        missed, wanted = self.squares(model, inputs)
        loss = (missed.sum(0) / wanted.sum(0)).mean()
        return (loss, (missed, wanted)) if return_outputs else loss

    def squares(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each text and layer, [batch, layers]: the sums of squared differences, and of squared answers."""
        inputs = {name: x for name, x in inputs.items() if name != "labels"} | {"use_cache": False}
        heard = self.hear(inputs)
        real, found = inputs.get("attention_mask"), {}

        def fit(layer: nn.Module, stream: torch.Tensor, *args, layer_idx: int, **context) -> torch.Tensor:
            """Stands for a layer of the student."""
            if layer_idx in heard:
                given, answer = (x.to(stream.dtype) for x in heard[layer_idx])
                differences = layer.mixer(given, layer_idx=layer_idx, **context) - answer
                shares = 1 if real is None else real[..., None]
                found[layer_idx] = [(x * shares).float().square().sum((1, 2)) for x in (differences, answer)]
            return stream

        backbone = self.model.base_model
        with calling(backbone, fit):
            model(**inputs, **({"logits_to_keep": 1} if self.model.can_generate() else {}))
        return tuple(torch.stack(parts, dim=1) for parts in zip(*(found[i] for i in self.layers), strict=True))

    @torch.no_grad()
    def hear(self, inputs: dict[str, torch.Tensor]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """By layer, what the teacher's attention is given, and what it answers."""
        heard = {}

        def listen(mixer, given, context, answer) -> None:
            heard[context["layer_idx"]] = given[0], answer

        backbone = self.teacher.base_model
        parts = {backbone.layers[backbone.config.layer_groups[layer]].mixer for layer in self.layers}
        hooks = [part.register_forward_hook(listen, with_kwargs=True) for part in parts]
        with contextlib.ExitStack() as stack:
            for hook in hooks:
                stack.callback(hook.remove)
            with self.accelerator.autocast():
                backbone(**inputs)
        return heard

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, (missed, wanted) = self.compute_loss(model, self._prepare_inputs(inputs), True)
        return loss, missed, wanted

    def errors_by_layer(self, evaluated: EvalPrediction) -> dict[str, float]:
        errors = evaluated.predictions.sum(0) / evaluated.label_ids.sum(0)
        return {f"layer_{layer}": float(error) for layer, error in zip(self.layers, errors, strict=True)}


def replaced_layers(model: PreTrainedModel, teacher: PreTrainedModel) -> list[int]:
    """Those whose mixers are of another type in the teacher."""
    new, old = model.config, teacher.config
    sizes = ("hidden_size", "layer_groups", "vocab_size")
    if not isinstance(new, ArchHybridConfig) or any(getattr(new, name) != getattr(old, name) for name in sizes):
        raise ValueError("The model is not the teacher with other mixers: take what hf_arch.uptrain makes of it.")
    layers = [i for i, kinds in enumerate(zip(new.layer_types, old.layer_types, strict=True)) if len(set(kinds)) > 1]
    if not layers:
        raise ValueError("All layers are of the types that they have in the teacher: there is no mixer to be fitted.")
    return layers


@contextlib.contextmanager
def calling(backbone: Backbone, instead) -> Iterator[None]:
    """`instead(layer, stream, ...)` is called where a layer would be."""
    backbone.call_layer = instead
    try:
        yield
    finally:
        del backbone.call_layer


@contextlib.contextmanager
def only_trainable(model: nn.Module, parts: list[nn.Module]) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, trainable in before:
            parameter.requires_grad_(trainable)
