"""Weights of few bits: every row loads, answers nearly as before, is smaller, saves, and learns by adapters alone."""

import re

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

import hf_arch
from hf_arch.compress import full_precision, quantization_config, quantize
from hf_arch.compress.quantize import apart
from hf_arch.modeling.layers.experts import SeparateExperts, SideBySide
from promises import EXACT, MODELS, Case, some_tokens

WIDE = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.05}  # matrices of whole groups
WIDER = {"hnet": {"inner_hidden_sizes": [64]}, "megabyte": {"global_hidden_sizes": [128]}}
BITS = {"int8": 0.3, "nf4": 0.6, "int4": 0.6}  # how far answers may be from those in full precision: chance is 1.4
FOUR_BITS = ("deepseek", "encoder_decoder", "hat", "hnet", "mixtral", "rwkv7", "s6", "transformer_xl")  # of each kind
ROUTED = Case(hf_arch.find("mixtral"), "ForCausalLM")
DENSE = Case(hf_arch.find("transformer"), "ForCausalLM")


def built(case: Case) -> transformers.PreTrainedModel:
    return case.build(torch.float32, **WIDE, **WIDER.get(case.row.name, {}))


def told(model) -> dict[str, torch.Tensor]:
    tokens = some_tokens(2, 24)
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})


def held_bytes(model: nn.Module) -> int:
    """Of parameters and of what matrices of few bits are made of."""
    count = 0
    for parameter in model.parameters():
        inside = [getattr(parameter, name, None) for name in ("qdata", "scale", "scale_and_zero")]
        state = getattr(parameter, "quant_state", None)
        inside = [each for each in inside if each is not None] or [parameter, *([state.absmax] if state else [])]
        count += sum(each.numel() * each.element_size() for each in inside)
    return count


CASES = [(case, "int8") for case in MODELS] + [(case, "nf4") for case in MODELS if case.row.name in FOUR_BITS]


@pytest.mark.parametrize("case, kind", CASES, ids=str)
def test_every_row_in_few_bits(case, kind, tmp_path):
    model = built(case)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = quantize(model, kind)
    inputs = told(model)
    with torch.no_grad():
        expected, found = model(**inputs).logits, small(**inputs).logits
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < BITS[kind], error
    assert held_bytes(small) < 0.75 * held_bytes(model)
    assert not any(isinstance(module, SideBySide) for module in small.modules())
    small.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert_close(again(**inputs).logits, found, atol=0, rtol=0)
    adapted = get_peft_model(again, hf_arch.lora_config(again, r=2)).train()
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert all("lora_" in name for name in trained)
    silent = [name for name, weight in trained.items() if "lora_B" in name and not weight.grad.any()]
    assert all(".experts." in name for name in silent)  # which no token took
    assert all(weight.grad is not None for weight in trained.values())
    assert_close(dict(model.state_dict()), before, atol=0, rtol=0)  # which stays as it is


@pytest.mark.parametrize("name", ["transformer", "mixtral", "s6"])
def test_int4_on_a_cpu_answers_and_is_told_what_it_cannot(name, tmp_path):
    model = built(Case(hf_arch.find(name), "ForCausalLM"))
    small, inputs = quantize(model, "int4"), told(model)
    with torch.no_grad():
        expected, found = model(**inputs).logits, small(**inputs).logits
    assert (found - expected).norm() < BITS["int4"] * expected.norm()
    assert held_bytes(small) < 0.75 * held_bytes(model)
    with pytest.raises(ValueError, match="Unsupported tensor type"):
        small.save_pretrained(tmp_path)
    adapted = get_peft_model(small, hf_arch.lora_config(small, r=2)).train()
    with pytest.raises(RuntimeError, match="not implemented"):
        adapted(**inputs, labels=inputs["input_ids"]).loss.backward()


KEPT = {
    "mixtral": r"lm_head|.*router\.gate",
    "deepseek": r"lm_head|.*router\.gate|.*kv_b_proj",
    "s6": r"lm_head|.*dt_proj",
    "rwkv7": r"lm_head|.*(reduce|expand)_proj",
    "hyena": r"lm_head|.*filter\.\w+",
    "transformer_xl": r"lm_head|.*r_proj",
    "mixture_of_depths": r"lm_head|.*view\.(gate|predictor\.\w+)",
    "hnet": r"lm_head|model\.resamplings\.0\.\w+",
    "retnet": r"lm_head",
}


@pytest.mark.parametrize("name, pattern", KEPT.items())
def test_what_decides_stays_in_full_precision(name, pattern):
    with torch.device("meta"):
        row = hf_arch.find(name)
        model = row.load("ForCausalLM")(row.tiny_config("ForCausalLM"))
    kept = full_precision(model)
    assert kept and all(re.fullmatch(pattern, each) for each in kept)
    ends = {each.rpartition(".")[2] for each in kept} - {"gate", "q_proj", "k_proj"}
    linears = [each for each, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert not [
        each for each in linears if each not in kept and each.rpartition(".")[2] in ends - {"gate", "q_proj", "k_proj"}
    ]


def test_a_checkpoint_loads_in_few_bits_and_adapters_survive(tmp_path):
    model = built(DENSE)
    model.save_pretrained(tmp_path / "full")
    how = quantization_config(model, "nf4")
    small = type(model).from_pretrained(tmp_path / "full", quantization_config=how, dtype=torch.float32)
    inputs = told(model)
    with torch.no_grad():
        expected = small(**inputs).logits
        assert_close(quantize(model, "nf4")(**inputs).logits, expected, atol=0, rtol=0)
    adapted = get_peft_model(small, hf_arch.lora_config(small, r=2)).eval()
    adapted.save_pretrained(tmp_path / "adapter")  # asks the matrices of few bits for their state
    with torch.no_grad():
        assert_close(adapted(**inputs).logits, expected, atol=0, rtol=0)
        again = PeftModel.from_pretrained(quantize(model, "nf4"), tmp_path / "adapter").eval()
        assert_close(again(**inputs).logits, expected, atol=0, rtol=0)


@torch.no_grad()
def test_separate_experts_are_experts():
    for fields in ({}, {"feed_forward_types": ["switch", "soft"], "direction": "bidirectional"}):
        stacked = (Case(hf_arch.find("transformer"), "ForMaskedLM") if fields else ROUTED).build(
            **fields, num_local_experts=4
        )
        config, state = apart(stacked)
        separate = type(stacked)(config).double().eval()
        separate.load_state_dict(state)
        assert sum(isinstance(module, SeparateExperts) for module in separate.modules()) == 2
        assert not config.base_model_ep_plan
        inputs = told(stacked)
        assert_close(separate(**inputs).logits, stacked(**inputs).logits, **EXACT)


def test_what_cannot_be_quantised_is_explained():
    model = built(DENSE)
    with pytest.raises(ValueError, match="'int3' is unknown; there are int8, int4, nf4"):
        quantize(model, "int3")
    with pytest.raises(ValueError, match="quantised already"):
        quantize(quantize(model, "int8"))
    with pytest.raises(ValueError, match="merge it first"):
        quantize(get_peft_model(built(DENSE), hf_arch.lora_config(model)))
    with pytest.raises(ValueError, match="not of hf_arch"):
        quantize(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2)))
