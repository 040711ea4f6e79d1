"""Engines that keep keys and values of many texts themselves: transformers' own, and what vLLM's transformers backend
asks of a model, as its release 0.33 does, which cannot be installed beside us."""

import ast
import inspect
import re
import textwrap
from importlib.metadata import entry_points

import pytest
import torch
import transformers
from torch.testing import assert_close
from transformers import ContinuousBatchingConfig, GenerationConfig

from engine import served
from hf_arch import ARCHITECTURES
from hf_arch.modeling.layers.attention import AttentionKernel
from promises import DECODERS, EXACT, Answering, some_tokens

SERVED = {
    "transformer": {"ForCausalLM", "gpt2", "vaswani", "deep_norm", "parallel", "none", "sliding", "yarn", "prefix"}
    | {"sparse"},
    "sparse_transformer": {"ForCausalLM"},
    "mixtral": {"ForCausalLM", "sliding"},
}


@pytest.mark.parametrize("case", DECODERS, ids=str)
def test_an_engine_answers_as_the_model_or_is_refused(case):
    """Prompts of several texts side by side, a prompt in pieces, steps, and a text that comes later."""
    model = case.build()
    texts = dict(zip("abc", some_tokens(3, 40), strict=True))
    rounds = ({"a": 20, "b": 13}, {"a": 1, "b": 9, "c": 17}, {"c": 1, "a": 1, "b": 1}, {"b": 1})
    with served(model) as engine:
        if (case.variant or case.head) not in SERVED.get(case.row.name, ()):
            with pytest.raises(ValueError, match="The attention 'vllm' cannot serve this hf_arch_"):
                engine.texts = [("a", 20)]  # which an encoder reads, before the decoder is asked
                (Answering(model) if case.answers else model)(texts["a"][None], use_cache=False)
            return
        found = {name: [] for name in texts}
        for sizes in rounds:
            new = {name: texts[name][engine.seen(name) :][:size] for name, size in sizes.items()}
            for name, logits in engine.step(new).items():
                found[name].append(logits)
    for name, parts in found.items():
        logits = torch.cat(parts)
        assert_close(logits, model(texts[name][None, : len(logits)]).logits[0], **EXACT)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "gelu"},
        {"eval_capacity_factor": 1.0},
        {"feed_forward_types": ["hierarchical"] * 2, "num_expert_groups": 2},
    ],
    ids=str,
)
def test_experts_that_vllm_would_take_for_others_are_refused(fields):
    model = next(case for case in DECODERS if case.row.name == "mixtral").build(**fields)
    with served(model) as engine, pytest.raises(ValueError, match="its experts are not Mixtral's"):
        engine.step({"a": some_tokens(1)[0]})


@pytest.mark.parametrize("name", ["transformer-sliding", "mixtral-ForCausalLM"])
def test_continuous_batching_answers_as_generate(name):
    model = next(case for case in DECODERS if str(case) == name).build(torch.float32)
    texts = [text[:length].tolist() for text, length in zip(some_tokens(3, 40), (40, 17, 25), strict=True)]
    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate_batch(
        inputs=texts,
        generation_config=GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, page_size=16, max_batch_tokens=64),
        progress_bar=False,
    )
    expected = [model.generate(torch.tensor([text]), **greedy)[0, len(text) :].tolist() for text in texts]
    assert [answer.generated_tokens for answer in found.values()] == expected


def test_the_call_of_the_kernel_can_be_read():
    """vLLM finds a layer's attention by the source of `forward`: what ALL_ATTENTION_FUNCTIONS gives is called once, by
    name, with a scaling that is an attribute."""
    forward = ast.parse(textwrap.dedent(inspect.getsource(AttentionKernel.forward)))
    looked_up = [
        node.targets[0].id
        for node in ast.walk(forward)
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS.get_interface(")
    ]
    calls = [node for node in ast.walk(forward) if isinstance(node, ast.Call) and ast.unparse(node.func) in looked_up]
    assert len(calls) == 1
    assert [ast.unparse(word.value) for word in calls[0].keywords if word.arg == "scaling"] == ["self.scaling"]


@pytest.mark.parametrize("case", [case for case in DECODERS if case.row.name in SERVED and not case.variant], ids=str)
def test_vllm_finds_what_it_puts_its_own_in_the_place_of(case):
    model = case.build()
    assert model.base_model_prefix == "model" and isinstance(model.model.layers, torch.nn.ModuleList)
    kernels = [module for module in model.model.modules() if isinstance(module, AttentionKernel)]
    assert [kernel.layer_idx for kernel in kernels] == list(range(model.config.num_hidden_layers))
    assert all(kernel.config is model.model.config and kernel.scaling > 0 for kernel in kernels)
    names = {name for name, _ in [*model.model.named_modules(), *model.model.named_parameters()]}
    for rule in model.model.tp_plan:  # by which it is split over GPUs
        assert any(re.fullmatch(rule.replace(".", r"\.").replace("*", r"\d+"), name) for name in names), rule


def test_the_plugin_is_found_and_may_be_loaded_twice(monkeypatch):
    (plugin,) = entry_points(group="vllm.general_plugins", name="hf_arch")
    for row in ARCHITECTURES:
        for head in row.heads:  # undone at the end
            monkeypatch.setattr(transformers, row.load(head).__name__, None, raising=False)
    for _ in range(2):
        plugin.load()()
    for row in ARCHITECTURES:
        for head in row.heads:
            assert getattr(transformers, row.load(head).__name__) is row.load(head)
