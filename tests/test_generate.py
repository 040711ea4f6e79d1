"""Promise 5: generate() gives what the model's own forward says, by every cache and strategy, in bounded memory."""

import pytest
import torch
from torch.testing import assert_close
from transformers import CompileConfig

from promises import DECODERS, EXACT, ROWS, cache_layers_of, new_cache

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
    cache = new_cache(decoder)
    first = decoder.generate(tokens, past_key_values=cache, **(GREEDY | {"max_new_tokens": 3}))
    assert torch.equal(decoder.generate(first, past_key_values=cache, **(GREEDY | {"max_new_tokens": 3})), expected)


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
