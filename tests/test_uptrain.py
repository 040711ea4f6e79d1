"""A Transformer with other mixers keeps all else to the bit, its mixers begin with the weights of its attention, learn
to answer as it did, and the whole is a model as any other."""

import contextlib

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from originals import GPT2, LLAMA, scaled_up
from peft import get_peft_model
from torch.nn.functional import silu
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, TrainingArguments

import hf_arch
from hf_arch.modeling.ops.retention import retention_decay
from hf_arch.remake.upcycle import as_ours
from hf_arch.remake.uptrain import FORMS
from promises import EXACT, Case, some_tokens

NEW = ("sink_attention", "favor", "retention", "ssd")
SHORT = {"sink_attention": {"sliding_window": 5, "num_sink_tokens": 2}}
TOKENS = some_tokens() % 61


def tiny(name: str = "LlamaForCausalLM", **fields):
    """A model of transformers with keys that heads share, in float64 and eval."""
    config = transformers.LlamaConfig(**LLAMA | fields)
    return scaled_up(getattr(transformers, name)(config)).double().eval()


@pytest.fixture(scope="module")
def llama():
    return tiny()


@pytest.fixture(scope="module")
def expected(llama):
    """The teacher's own answers; theirs narrow to float32 in places."""
    with torch.no_grad():
        answer = as_ours(llama)(TOKENS).logits
        assert_close(llama(TOKENS).logits, answer, atol=1e-4, rtol=1e-4)
    return answer


def others(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".mixer." not in name}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention", "sink_attention"])
def test_attention_that_sees_all_answers_as_before(kind, llama, expected):
    options = {} if kind == "full_attention" else {"sliding_window": TOKENS.shape[1]}
    student = hf_arch.uptrain(llama, kind, **options)
    assert student.config.layer_types == [kind] * 2 and not student.training
    assert_close(student(TOKENS).logits, expected, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("kind", NEW)
def test_all_but_the_mixers_is_kept_and_the_student_is_a_model_as_any_other(kind, llama, tmp_path):
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    llama.generation_config.max_new_tokens = 7
    student = hf_arch.uptrain(llama, kind, **SHORT.get(kind, {}))
    assert_close(others(student), others(as_ours(llama)), atol=0, rtol=0)
    assert student.generation_config.max_new_tokens == 7 and student.dtype == torch.float64
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    whole = student(TOKENS).logits
    assert_close(again(TOKENS).logits, whole, atol=0, rtol=0)
    outputs = again(TOKENS[:, :9], use_cache=True)
    held = [sum(state.nbytes for state in layer.states.values()) for layer in outputs.past_key_values.layers]
    outputs = again(TOKENS[:, 9:], past_key_values=outputs.past_key_values)
    assert_close(outputs.logits, whole[:, 9:], **EXACT)
    assert held == [sum(state.nbytes for state in layer.states.values()) for layer in outputs.past_key_values.layers]
    assert again.generate(TOKENS[:1]).shape == (1, TOKENS.shape[1] + 7)
    assert_close(dict(llama.state_dict()), before, atol=0, rtol=0)  # which stays as it is


def per_head(attention, hidden_states):
    """Queries, keys and values [batch, length, 4, 8], as each of the heads has them."""
    parts = [part(hidden_states).unflatten(-1, (-1, 8)) for part in (attention.q_proj, attention.k_proj)]
    parts.append(attention.v_proj(hidden_states).unflatten(-1, (-1, 8)))
    return [part.repeat_interleave(4 // part.shape[2], dim=2) for part in parts]


def normed(x, eps):
    return (x / (x.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"attention_bias": True, "num_key_value_heads": 4}], ids=["groups", "biases"])
def test_weights_mean_what_the_papers_say(fields):
    """The definitions of retention and SSD, written out with the projections of the attention."""
    teacher = as_ours(tiny(**fields))
    attention, hidden_states = teacher.model.layers[1].mixer, torch.randn(2, 13, 32, dtype=torch.float64)
    _, positions = teacher.model.embed_positions(hidden_states, torch.arange(13)[None])
    query, key, value = per_head(attention, hidden_states)
    ages = torch.arange(13)[:, None] - torch.arange(13)

    mixer = hf_arch.uptrain(teacher, "retention").model.layers[1].mixer
    decay = torch.where(ages >= 0, retention_decay(4, "cpu", torch.float64)[:, None, None] ** ages, 0)
    scores = torch.einsum("bihd,bjhd->bhij", *positions.rotate(query, key)) * decay / 8**0.5
    output = normed(torch.einsum("bhij,bjhd->bihd", scores, value), teacher.config.norm_eps)
    assert_close(mixer(hidden_states, position_embeddings=positions), attention.o_proj(output), atol=1e-6, rtol=1e-6)

    mixer = hf_arch.uptrain(teacher, "ssd").model.layers[1].mixer
    step = torch.nn.functional.softplus(mixer.in_proj(hidden_states)[..., -4:] + mixer.dt_bias)
    sums = (step * mixer.A_log.exp()).cumsum(1)
    decay = torch.where((ages >= 0)[..., None], (sums[:, None] - sums[:, :, None]).exp(), 0)
    scores = torch.einsum("bihd,bjhd,bijh,bjh->bhij", silu(query), silu(key), decay, step)
    output = normed(torch.einsum("bhij,bjhd->bihd", scores, silu(value)), mixer.norm.eps)
    assert_close(mixer(hidden_states), attention.o_proj(output), atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in FORMS if kind != "retention"])
def test_wide_heads_tied_embeddings_and_other_heads_of_the_model(kind):
    student = hf_arch.uptrain(tiny(head_dim=12, tie_word_embeddings=True), kind, layers=[1])
    assert student.config.layer_types == ["full_attention", kind]
    assert student.lm_head.weight is student.model.embed_tokens.weight and student(TOKENS).logits.isfinite().all()
    scorer = hf_arch.uptrain(tiny("LlamaForSequenceClassification", num_labels=3), kind)
    assert type(scorer).__name__ == "ArchHybridForSequenceClassification" and scorer(TOKENS).logits.shape == (2, 3)


@torch.no_grad()
def test_any_transformer_and_several_kinds():
    gpt2 = (
        scaled_up(transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | {"n_positions": 128}))).double().eval()
    )
    student = hf_arch.uptrain(gpt2, "sink_attention", sliding_window=TOKENS.shape[1])
    assert_close(student(TOKENS).logits, as_ours(gpt2)(TOKENS).logits, **EXACT)
    mixtral = Case(hf_arch.find("mixtral"), "ForCausalLM").build()
    student = hf_arch.uptrain(mixtral, "full_attention")
    assert_close(student(TOKENS).logits, mixtral(TOKENS).logits, **EXACT)
    student = hf_arch.uptrain(hf_arch.uptrain(mixtral, "ssd", layers=[0]), "retention", layers=[1])
    assert student.config.layer_types == ["ssd", "retention"] and student(TOKENS).logits.isfinite().all()
    assert student.config.feed_forward_types == ["sparse"] * 2
    shared = Case(hf_arch.find("transformer"), "Model", "", {"num_hidden_groups": 1}).build()
    student = hf_arch.uptrain(shared, "sink_attention", sliding_window=TOKENS.shape[1])
    assert_close(student(TOKENS)[0], shared(TOKENS)[0], **EXACT)


def arguments(folder, **options):
    told = {"per_device_train_batch_size": 4, "learning_rate": 5e-3, "report_to": [], "save_strategy": "no"}
    return TrainingArguments(str(folder), **told | options, disable_tqdm=True, use_cpu=True)


def texts(count: int = 8) -> list[dict]:
    draw = torch.Generator().manual_seed(5)
    return [{"input_ids": (ids := torch.randint(1, 61, (16,), generator=draw)), "labels": ids} for _ in range(count)]


def caught(module, store: list):
    return module.register_forward_hook(lambda module, given, answer: store.append(answer))


@torch.no_grad()
def test_the_error_is_what_the_mixers_miss_of_real_tokens(llama, tmp_path):
    """In the first layer a mixer is given by the student itself what the teacher gives it."""
    teacher, student = as_ours(llama), hf_arch.uptrain(llama, "retention")
    trainer = hf_arch.MixerTrainer(student, arguments(tmp_path), teacher=llama)
    mask = torch.ones_like(TOKENS)
    mask[0, -7:], mask[1, :3] = 0, 0
    missed, wanted = trainer.squares(student, {"input_ids": TOKENS, "attention_mask": mask, "labels": TOKENS})
    answers = []
    with contextlib.ExitStack() as stack:
        for model in (teacher, student):
            stack.callback(caught(model.model.layers[0].mixer, answers).remove)
            model(TOKENS, attention_mask=mask)
    attended, mixed = (answer * mask[..., None] for answer in answers)
    assert_close(wanted[:, 0].double(), attended.square().sum((1, 2)))
    assert_close(missed[:, 0].double(), (mixed - attended).square().sum((1, 2)))
    other = TOKENS.where(mask.bool(), 7)
    again = trainer.squares(student, {"input_ids": other, "attention_mask": mask})
    assert_close(again, (missed, wanted))
    assert "call_layer" not in vars(student.model)  # layers are called again
    exact = hf_arch.MixerTrainer(
        hf_arch.uptrain(llama, "sink_attention", sliding_window=30), arguments(tmp_path), teacher=llama
    )
    assert exact.evaluate(texts(2))["eval_loss"] < 1e-20


@pytest.mark.parametrize("kind", NEW)
def test_mixers_are_fitted_and_then_adapters_of_all_learn(kind, llama, tmp_path):
    torch.manual_seed(0)
    student, data = hf_arch.uptrain(llama, kind, layers=[1], **SHORT.get(kind, {})).float(), texts()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    trainer = hf_arch.MixerTrainer(student, arguments(tmp_path, max_steps=12), teacher=llama, train_dataset=data)
    first = trainer.evaluate(data)
    trainer.train()
    last = trainer.evaluate(data)
    assert last["eval_loss"] < 0.9 * first["eval_loss"] and last["eval_layer_1"] < 0.9 * first["eval_layer_1"]
    assert "eval_layer_0" not in last and all(parameter.requires_grad for parameter in student.parameters())
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, _ in student.named_parameters() if name.startswith("model.layers.1.mixer.")}

    adapted = get_peft_model(student, hf_arch.lora_config(student, r=4))
    adapters = {name.split(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in adapters if ".layers.1.mixer." in name} == (
        {"in_proj", "out_proj"}
        if kind == "ssd"
        else {f"{x}_proj" for x in ("qkvog" if kind == "retention" else "qkvo")}
    )
    trainer = transformers.Trainer(adapted, arguments(tmp_path, max_steps=12), train_dataset=data)
    first = trainer.evaluate(data)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(data)["eval_loss"] < 0.95 * first


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("lstm", {}, "cannot become 'lstm'; it can become full_attention, .*favor, retention, ssd"),
        ("ssd", {"state_size": 4}, "state_size cannot be chosen for 'ssd', which leaves conv_kernel, "),
        ("retention", {"hidden_size": 4}, "which leaves nothing open"),
        ("ssd", {"layers": [2]}, "layers names 2, but there are 0 to 1"),
        ("ssd", {"layers": []}, "No layer is to change"),
        ("sink_attention", {"sliding_window": 1}, "need a sliding_window of at least 2"),
    ],
)
def test_what_cannot_be_is_explained(kind, options, message, llama):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        hf_arch.uptrain(llama, kind, **options)


def test_models_that_do_not_fit_are_refused(llama, tmp_path):
    with pytest.raises(
        ValueError, match="hidden_size / num_attention_heads wide, 32 / 4, but those of the model are 12"
    ):
        hf_arch.uptrain(tiny(head_dim=12), "retention")
    with pytest.raises(ValueError, match="merge it first"):
        hf_arch.uptrain(get_peft_model(tiny(), hf_arch.lora_config(as_ours(llama))), "ssd")
    with pytest.raises(ValueError, match="neither of hf_arch"):
        hf_arch.uptrain(transformers.MptModel(transformers.MptConfig(d_model=8, n_heads=2, n_layers=1)), "ssd")
    with pytest.raises(ValueError, match="A retnet cannot be uptrained"):
        hf_arch.uptrain(Case(hf_arch.find("retnet"), "ForCausalLM").build(), "ssd")
    encoder = Case(hf_arch.find("transformer"), "ForMaskedLM", "", {"direction": "bidirectional"}).build()
    with pytest.raises(ValueError, match="A bidirectional transformer cannot"):
        hf_arch.uptrain(encoder, "ssd")
    biased = Case(hf_arch.find("transformer"), "ForCausalLM", "", {"position_type": "alibi"}).build()
    with pytest.raises((ValueError, StrictDataclassError), match="know no positions of type 'alibi'"):
        hf_arch.uptrain(biased, "sink_attention")
    half = hf_arch.uptrain(llama, "sink_attention", layers=[0], sliding_window=9)
    with pytest.raises(ValueError, match="that stay, with sliding_window 9: it cannot be 5"):
        hf_arch.uptrain(half, "sliding_attention", layers=[1], sliding_window=5)
    mixed = hf_arch.uptrain(llama, "ssd", layers=[0])
    with pytest.raises(ValueError, match="Layer 0 is of type ssd"):
        hf_arch.uptrain(mixed, "favor", layers=[0])
    for model, message in (
        (llama, "take what hf_arch.uptrain makes"),
        (hf_arch.uptrain(llama, "full_attention"), "no"),
    ):
        with pytest.raises(ValueError, match=message):
            hf_arch.MixerTrainer(model, arguments(tmp_path), teacher=llama)
