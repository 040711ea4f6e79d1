"""The loss in chunks is transformers' loss, without its memory."""

import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_arch.modeling.skeleton import heads, loss
from promises import ROWS, some_tokens

VOCABULARY = 96


def some_labels(batch: int = 3, length: int = 17) -> torch.Tensor:
    labels = some_tokens(batch, length)
    labels[0, :5], labels[1, -3:], labels[2, 4:9] = -100, -100, -100
    return labels


def loss_and_gradients(of, hidden_states, lm_head):
    value = of(hidden_states, lm_head)
    return value, *torch.autograd.grad(value, (hidden_states, lm_head.weight))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_items_in_batch": 100},
        {"num_items_in_batch": torch.tensor(100)},
        {"shift_labels": some_tokens(3, 17, seed=2)},
        {"ignore_index": 7, "unknown": 1},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
@pytest.mark.parametrize("tokens_at_once", [1, 7, 51, 1000])
def test_is_the_loss_of_transformers(monkeypatch, tokens_at_once, options):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", tokens_at_once * VOCABULARY)
    labels = some_labels().where(some_labels() != -100, options.get("ignore_index", -100))
    hidden_states = torch.randn(3, 17, 8, dtype=torch.float64, requires_grad=True)
    lm_head = torch.nn.Linear(8, VOCABULARY, bias=False, dtype=torch.float64)

    def chunked(hidden_states, lm_head):
        return loss.chunked_cross_entropy(hidden_states, lm_head, labels, **options)

    def whole(hidden_states, lm_head):
        return ForCausalLMLoss(lm_head(hidden_states), labels, VOCABULARY, **options)

    # transformers goes through float32
    for found, expected in zip(
        *(loss_and_gradients(of, hidden_states, lm_head) for of in (chunked, whole)), strict=True
    ):
        assert_close(found, expected, atol=1e-6, rtol=1e-5, check_dtype=False)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 7 * VOCABULARY)
    return lambda: monkeypatch.setattr(heads, "LOGITS_AT_ONCE", 7 * VOCABULARY)


@pytest.mark.parametrize("variant", ["plain", "tied", "lora", "autocast", "checkpointed"])
def test_a_head_in_chunks_is_the_head_in_one(small_chunks, variant):
    model = ROWS[0].build(torch.float32, tie_word_embeddings=variant == "tied").train()
    if variant == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    if variant == "checkpointed":
        model.gradient_checkpointing_enable()
    ids, labels = some_tokens(3, 17), some_labels()

    def run():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=variant == "autocast"):
            outputs = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(40))
        outputs.loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        return outputs, {name: gradient.clone() for name, gradient in gradients.items()}

    whole, expected = run()
    small_chunks()
    chunked, found = run()
    assert whole.logits is not None and chunked.logits is None and whole.loss.dtype == chunked.loss.dtype
    close = {"atol": 1e-2, "rtol": 2e-2} if variant == "autocast" else {"atol": 1e-5, "rtol": 1e-4}
    assert_close(chunked.loss, whole.loss, **close)
    assert_close(found, expected, **close)
    with torch.no_grad():
        assert model.eval()(input_ids=ids, labels=labels).logits is not None


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        for tensor in tree_leaves(made):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and id(storage) not in self.sizes:
                self.sizes[id(storage)] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, id(storage))
        self.peak = max(self.peak, sum(self.sizes.values()))
        return made


def peak_of_training(of, tokens: int = 4096, vocabulary: int = 50_000) -> int:
    with FakeTensorMode(), LiveMemory() as memory:
        hidden_states = torch.randn(1, tokens, 16, requires_grad=True)
        lm_head = torch.nn.Linear(16, vocabulary, bias=False)
        of(hidden_states, lm_head, torch.randint(vocabulary, (1, tokens))).backward()
    return memory.peak


def test_memory_is_that_of_some_chunks():
    def whole(hidden_states, lm_head, labels):
        return ForCausalLMLoss(lm_head(hidden_states), labels, lm_head.weight.shape[0])

    chunk = loss.LOGITS_AT_ONCE * 4
    assert peak_of_training(loss.chunked_cross_entropy) < 4 * chunk
    assert peak_of_training(whole) > 4096 * 50_000 * 4 * 2 > 20 * chunk
