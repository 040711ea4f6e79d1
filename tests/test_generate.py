"""Promise 5: generate() gives what the model's own forward says, by every cache and strategy, in bounded memory."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import CompileConfig

from promises import DECODERS, EXACT, ROWS, cache_layers_of, new_cache

STUCK = [case for case in DECODERS if "assisted decoding" in case.exceptions]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def half_padded(tokens):
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@torch.no_grad()
def test_greedy_is_the_argmax_of_its_own_forward(decoder, tokens):
    generated = decoder.generate(tokens, **GREEDY)
    assert torch.equal(generated[:, 70:], decoder(generated).logits[:, 69:-1].argmax(-1))


@torch.no_grad()
def test_a_padded_batch_generates_what_each_prompt_generates_alone(decoder, tokens, half_padded):
    alone = [decoder.generate(row[None, start:], **GREEDY)[:, -6:] for row, start in zip(tokens, (0, 9), strict=True)]
    assert torch.equal(decoder.generate(**half_padded, **GREEDY)[:, -6:], torch.cat(alone))


@torch.no_grad()
@pytest.mark.parametrize("strategy", [{"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 20}], ids=str)
def test_strategies_do_not_depend_on_the_cache(decoder, half_padded, strategy):
    def run(**options):
        torch.manual_seed(3)
        return decoder.generate(**half_padded, **(GREEDY | strategy | options))

    expected = run(use_cache=False)
    assert torch.equal(run(), expected)
    assert torch.equal(run(num_return_sequences=1, cache_implementation="static"), expected)


@torch.no_grad()
@pytest.mark.parametrize("case", [*ROWS, *(case for case in DECODERS if case.variant in ("sliding", "t5"))], ids=str)
def test_a_compiled_step_is_one_graph(case, half_padded):
    decoder = case.decoder()
    expected = decoder.generate(**half_padded, **GREEDY)
    options = GREEDY | {"cache_implementation": "static"}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiled._compile_all_devices = True
    assert torch.equal(decoder.generate(**half_padded, **options, compile_config=compiled), expected)
    # transformers' static sliding layer guards on its length as an int: a second graph, for any length, is made
    graphs = 1 + ("sliding_attention" in decoder.config.layer_types)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@torch.no_grad()
def test_a_prompt_is_read_in_chunks_and_a_cache_goes_on(decoder, tokens):
    expected = decoder.generate(tokens, **GREEDY)
    assert torch.equal(decoder.generate(tokens, **GREEDY, prefill_chunk_size=32), expected)
    options = GREEDY | {"past_key_values": new_cache(decoder), "max_new_tokens": 3}
    first = decoder.generate(tokens, **options)
    real = torch.ones_like(first)  # or an answer that is the padding token would count as padding
    assert torch.equal(decoder.generate(first, attention_mask=real, **options), expected)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 7, 70])
@pytest.mark.parametrize("case", [case for case in DECODERS if not case.answers], ids=str)
def test_a_padded_prompt_is_read_in_chunks(case, half_padded, size):
    """Of an answer's prompt transformers cuts the tokens, and not the mask."""
    decoder = case.build()
    expected = decoder.generate(**half_padded, **GREEDY)
    for cache in ({}, {"cache_implementation": "static"}):
        found = decoder.generate(**half_padded, **GREEDY, **cache, prefill_chunk_size=size)
        assert torch.equal(found, expected), cache


@torch.no_grad()
@pytest.mark.parametrize("case", [case for case in DECODERS if case not in STUCK], ids=str)
@pytest.mark.parametrize("helper", ["prompt", "itself", "another"])
def test_assisted_decoding_names_the_same_tokens(case, tokens, helper):
    """Candidates of a helper are all right, or wrong at some place: states go back to where they were right."""
    decoder = case.decoder()
    prompt = torch.cat((tokens[:1, :20], tokens[:1, :20]), dim=1)
    options = GREEDY | {"max_new_tokens": 14}
    expected = decoder.generate(prompt, **options)
    if helper == "prompt":
        options |= {"prompt_lookup_num_tokens": 4}
    elif helper == "itself":
        options |= {"assistant_model": getattr(decoder, "model", decoder) if case.answers else decoder}
    else:
        options |= {"assistant_model": nearly(decoder.model if case.answers else decoder)}
    found = decoder.generate(prompt, **options, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected)
    given = {"input_ids": expected, "attention_mask": torch.ones_like(expected)}  # what was named may be the pad token
    going_on = decoder.generate(**given, past_key_values=found.past_key_values, **GREEDY)
    assert torch.equal(going_on, decoder.generate(**given, **GREEDY))


def nearly(decoder):
    """A model that mostly, not always, names the same tokens."""
    other = copy.deepcopy(decoder)
    for parameter in other.parameters():
        parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, dtype=parameter.dtype))
    return other


@torch.no_grad()
@pytest.mark.parametrize("case", STUCK, ids=str)
def test_assisted_decoding_that_cannot_go_back_is_refused(case, tokens):
    decoder = case.build()
    for helper in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": decoder}):
        with pytest.raises(ValueError, match="cannot: generate without assistant_model"):
            decoder.generate(tokens[:1], **helper, max_new_tokens=3)
    cache = decoder(tokens, use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-2)


@torch.no_grad()
def test_generation_from_embeddings(decoder, decoder_case, tokens):
    embeds = decoder.get_input_embeddings()(tokens)
    model = decoder.model if decoder_case.answers else decoder  # generate() embeds the source alone
    start = 0 if decoder_case.answers else 70
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), model.generate(tokens, **GREEDY)[:, start:])


@torch.no_grad()
def test_the_cache_can_be_split_and_repeated(decoder, tokens):
    cache = decoder(tokens, use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    following = tokens[:, :1].flip(0)
    expected = decoder(torch.cat((tokens.flip(0), following), dim=1)).logits[:, -1:]
    assert_close(decoder(following, past_key_values=cache).logits, expected, **EXACT)


@torch.no_grad()
def test_the_state_stays_as_large_as_the_paper_says(row_case, tokens):
    model = row_case.build()

    def numbers_held(length):
        layers = cache_layers_of(model(tokens[:1].repeat(1, 3)[:, :length], use_cache=True).past_key_values)
        tensors = [tensor for layer in layers for tensor in vars(layer).values()]
        tensors += [tensor for layer in layers for tensor in getattr(layer, "states", {}).values()]
        return sum(tensor.numel() for tensor in tensors if isinstance(tensor, torch.Tensor))

    with row_case.keeps("bounded state"):
        assert numbers_held(200) <= 1.1 * numbers_held(100)
