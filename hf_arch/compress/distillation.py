"""A student learns from a teacher's answers (Hinton et al., 2015, arXiv:1503.02531)."""

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_arch.modeling.skeleton.conditional_generation import ConditionalGeneration
from hf_arch.modeling.skeleton.heads import CausalLM

IGNORED = -100  # a label where nothing is asked


def soft_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), summed over tokens; logits [tokens, vocabulary]. With T^2
    its gradients are as large as those of the loss of labels, at any temperature (section 2 of the paper)."""
    wide = torch.promote_types(student.dtype, torch.float32)
    named, told = ((logits.to(wide) / temperature).log_softmax(-1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(named, told, log_target=True, reduction="sum")


class DistillationTrainer(Trainer):
    """A Trainer whose loss is that of the labels and that of a teacher's answers to the same batch. Example:

        small = hf_arch.compress.prune(model, heads=0.5, channels=0.5, batches=batches)
        DistillationTrainer(small, arguments, teacher=model, train_dataset=windows).train()

    The loss is (1 - alpha) * loss of the labels + alpha * `soft_loss` at `temperature` + `hidden_weight` * squared
    distance of the last hidden states, each of length one; all are means over the tokens that are asked for, of all
    batches and processes of a step. Places whose label is -100 count for nothing. `teacher` is a model of the same task
    and vocabulary, of any architecture, ours or transformers'; it is put into evaluation, and learns nothing. Only the
    student is saved; it may wear adapters. Evaluation tells the loss of the labels alone.

    Raises ValueError where the two name different numbers of tokens, where `hidden_weight` is to compare states of
    different widths, and for numbers out of range.
    """

    def __init__(
        self,
        *args,
        teacher: PreTrainedModel,
        temperature: float = 2.0,
        alpha: float = 0.5,
        hidden_weight: float = 0.0,
        **options,
    ):
        super().__init__(*args, **options)
        if temperature <= 0 or not 0 <= alpha <= 1 or hidden_weight < 0:
            raise ValueError(
                f"temperature {temperature} must be positive, alpha {alpha} from 0 to 1, and hidden_weight "
                f"{hidden_weight} not negative."
            )
        self.check_sizes(teacher, hidden_weight)
        self.temperature, self.alpha, self.hidden_weight = temperature, alpha, hidden_weight
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        student = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self.shifts = type(student).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        self.asked = {"return_logits": True} if isinstance(student, CausalLM | ConditionalGeneration) else {}

    def check_sizes(self, teacher: PreTrainedModel, hidden_weight: float) -> None:
        own, others = self.model.config, teacher.config
        if own.vocab_size != others.vocab_size:
            raise ValueError(
                f"The teacher names {others.vocab_size} tokens and the student {own.vocab_size}: both have to read by "
                f"the same tokenizer. Make the student with vocab_size={others.vocab_size}."
            )
        if hidden_weight and own.hidden_size != others.hidden_size:
            raise ValueError(
                f"Hidden states of {others.hidden_size} and {own.hidden_size} numbers cannot be compared: leave "
                "hidden_weight at 0, or take a student as wide as the teacher, such as a pruned one."
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if inputs.get("labels") is None:
            raise ValueError("The batch has no labels: they say which tokens are asked for.")
        told = {**inputs} | ({"output_hidden_states": True} if self.hidden_weight else {})
        hard, outputs = super().compute_loss(model, told | self.asked, True, num_items_in_batch)
        with torch.no_grad(), self.accelerator.autocast():
            taught = self.teacher(**told)
        labels = inputs["labels"]
        at = (labels[:, 1:] if self.shifts else labels) != IGNORED
        tokens = at.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            tokens = tokens / self.accelerator.num_processes  # gradients are averaged over processes
        loss = (1 - self.alpha) * hard
        student, teacher = (self.at(each.logits, at) for each in (outputs, taught))
        loss = loss + self.alpha * soft_loss(student, teacher, self.temperature) / tokens
        if self.hidden_weight:
            student, teacher = (F.normalize(self.at(last_states(each), at), dim=-1) for each in (outputs, taught))
            loss = loss + self.hidden_weight * (student - teacher).square().sum() / tokens
        return (loss, outputs) if return_outputs else loss

    def at(self, values: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """[batch, length, size] -> [tokens, size], at the places that name what is asked."""
        return (values[:, :-1] if self.shifts else values)[asked]


def last_states(outputs) -> torch.Tensor:
    """[batch, length, size], of a decoder where there are two stacks."""
    return (outputs.get("decoder_hidden_states") or outputs.hidden_states)[-1]
