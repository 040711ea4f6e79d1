"""The least that a machine would need: what is counted is what is computed, and times its rates."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_arch import ARCHITECTURES, find
from hf_arch.bench import costs, costs_of_hierarchies, costs_of_long_context, floors
from hf_arch.bench.contender import head_of
from hf_arch.bench.settings import ANSWERING, SMALL
from hf_arch.bench.worker.hugging_face import LED, OurReader
from hf_arch.bench.worker.serve import ON_CPU
from hf_arch.bench.worker.subject import ANSWER
from hf_arch.modeling.hierarchical.hnet.modeling_hnet import DynamicChunking
from hf_arch.modeling.layers.mixer import Mixer
from hf_arch.modeling.layers.routed_view import RoutedView
from hf_arch.modeling.ops.random_blocks import BlockChoice
from hf_arch.modeling.ops.segment_rows import Window

SHAPE = SMALL | {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 50}
RATES = {"matmul": 1e9, "bandwidth": 1e8, "exponential": 1e7}
SEGMENTS = {"segment_length": 32, "memory_length": 32}
WINDOWS = {  # smaller than the text
    "transformer_xl": SEGMENTS,
    "compressive_transformer": SEGMENTS | {"compressed_memory_length": 8, "compression_rate": 16},
    "bigbird": {"block_size": 16},
    "mixture_of_depths": {"capacity": 1.0},
    "hnet": {"inner_hidden_sizes": [64], "target_ratios": [2.0], "state_head_dim": 16, "state_size": 16},
}


def every_other(self, probability: torch.Tensor) -> torch.Tensor:
    """Of the items [rows, items, 1], whether one begins a chunk: the first does, and a step."""
    return (torch.arange(probability.shape[1]) % 2 == 0)[None, :, None].expand_as(probability)


def paper(row, **fields):
    return floors.on_paper(row, head_of(row), SHAPE | WINDOWS.get(row.name, {}) | fields)


def counted(row, span, **fields) -> int:
    """Operations of matrix products as torch counts them, every pair of tokens among them."""
    model = row.load(head_of(row))(row.load("Config")(**(SHAPE | WINDOWS.get(row.name, {}) | fields))).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(torch.full((1, 1), 5))  # what is made once for all texts
        cache = model(torch.full((1, span.before), 5), use_cache=True).past_key_values if span.before else None
        answer = {"decoder_input_ids": torch.full((1, ANSWER), 5)} if row.name in ANSWERING else {}
        with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
            model(torch.full((1, span.tokens), 5), past_key_values=cache, use_cache=cache is not None, **answer)
    return counter.get_total_flops()


# Who computes more than the floor: blocks of a short convolution are whole matrices, with zeros in them; texts that are
# short for a Fourier transform, whose operations torch does not count, go through such blocks; chunks of sorted tokens
# are compared with all that one of them might see; values are made as wide as keys, with zeros; averages over time are
# matrix products
MORE = {"h3": 1.12, "hyena": 1.5, "reformer": 1.2, "routing_transformer": 1.08, "deepseek": 1.1, "hnet": 1.05}
PASS, STEP = costs.Span(256), costs.Span(1, before=192)  # an encoder makes no steps
COUNTED = [(row, PASS) for row in ARCHITECTURES if head_of(row)]
COUNTED += [(row, STEP) for row in ARCHITECTURES if head_of(row) == "ForCausalLM"]


@pytest.mark.parametrize("row, span", COUNTED, ids=lambda of: getattr(of, "name", None) or f"{of.before}-{of.tokens}")
def test_floors_count_what_is_computed(row, span, monkeypatch):
    monkeypatch.setattr(costs, "visible_pairs", lambda span, *kind: span.tokens * (span.before + span.tokens))
    monkeypatch.setattr(costs_of_long_context, "segment_pairs", lambda window, span: span.tokens * window.span)
    monkeypatch.setattr(costs_of_long_context, "slot_pairs", lambda rate, span: span.tokens * rate.reach)
    monkeypatch.setattr(costs_of_hierarchies, "often", lambda span, tokens: 1)  # this step completes all groups
    monkeypatch.setattr(RoutedView, "decide", lambda self, scores: torch.ones_like(scores, dtype=torch.bool))
    monkeypatch.setattr(DynamicChunking, "decide", every_other)
    operations = costs.cost(paper(row), span).operations
    if span.tokens == 1 and "bounded state" not in row.exceptions:  # a step need not be made of matrix products
        assert counted(row, span) <= 1.02 * operations
    else:
        assert 0.97 * operations <= counted(row, span) <= MORE.get(row.name, 1.03) * operations


@torch.no_grad()
def test_a_step_of_an_answer_is_as_much_after_any_source():
    """But for the keys of segments; and each subject goes on from what it has read."""
    row = find("hat_encoder_decoder")
    model = paper(row)
    short, long = (costs.cost(model, costs.Span(1, before)) for before in (1024, 4096))
    layers, segments = model.config.num_hidden_layers, 3072 // 128
    assert long.operations - short.operations == layers * 2 * segments * 64
    assert long.exponentials == short.exponentials
    ids = torch.arange(3, 43)[None]
    for subject in (LED(SHAPE, 512), OurReader(SHAPE, 512, row=row.name, head="ForConditionalGeneration")):
        model = subject.model.eval()
        memory = subject.step(ids[:, 1:2], subject.begin(ids, 4))
        cache, told = memory["past_key_values"], {"past_key_values": None, "decoder_input_ids": ids[:, :3]}
        assert cache.get_seq_length() == 2
        step = model(**memory, decoder_input_ids=ids[:, 2:3]).logits
        torch.testing.assert_close(step, model(**(memory | told)).logits[:, 2:], atol=1e-4, rtol=1e-4)
        assert subject.logits(ids).shape == (1, 40, 50) and subject.loss(ids).isfinite()


def test_only_pairs_that_are_seen_are_counted():
    def pairs_by_hand(span, window):
        positions = range(span.before, span.before + span.tokens)
        return sum(1 for query in positions for key in range(query + 1) if query - key < window)

    for span in (costs.Span(20), costs.Span(1, 30), costs.Span(7, 5)):
        assert costs.visible_pairs(span) == pairs_by_hand(span, 1000)
        assert costs.visible_pairs(span, window=9) == pairs_by_hand(span, 9)
        assert costs.visible_pairs(span, causal=False) == span.tokens * sum(span)
        assert costs_of_long_context.segment_pairs(Window(99, 1), span) == pairs_by_hand(span, 1000)
        assert costs_of_long_context.segment_pairs(Window(5, 8, True), span) == pairs_by_hand(span, 9)
    assert costs_of_long_context.segment_pairs(Window(4, 3), costs.Span(4, 4)) == 4 + 5 + 6 + 7
    causal, encoder = BlockChoice(2, 1, 0, 1, True, 0), BlockChoice(1, 1, 1, 1, False, 0)
    assert costs_of_long_context.block_pairs(causal, 4, costs.Span(5, 10)) == 11 + 12 + 13 + 14 + 15
    assert costs_of_long_context.block_pairs(causal, 4, costs.Span(1, 40)) == 4 + 4 + 4 + 1
    assert costs_of_long_context.block_pairs(encoder, 4, costs.Span(23)) == 4 * 23 + 4 * 4 * 15 + 3 * 23


def test_layers_that_share_weights_are_as_much_work():
    row = ARCHITECTURES[0]
    assert costs.cost(paper(row, num_hidden_groups=1), costs.Span(64)).operations == (
        costs.cost(paper(row), costs.Span(64)).operations
    )


def test_a_floor_is_the_machines_rates_times_the_work():
    model = paper(ARCHITECTURES[0])
    work, step = costs.cost(model, costs.Span(128)), costs.cost(model, costs.Span(1, 500))
    products, exponentials = work.operations / 1e9, work.exponentials / 1e7
    assert floors.floor_seconds(model, "forward", 128, RATES) == pytest.approx(products + exponentials)
    assert floors.floor_seconds(model, "training", 128, RATES) == pytest.approx(3 * products + exponentials)
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    weights -= model.model.embed_tokens.weight.numel()
    assert step.numbers == weights + 2 * 2 * 64 * 501  # keys and values of two layers
    expected = 4 * step.numbers / 1e8 + step.exponentials / 1e7
    assert floors.floor_seconds(model, "step", 500, RATES) == pytest.approx(expected)
    assert floors.floor_seconds(model, "step", 500, RATES, number_bytes=2) < expected


def test_a_mixer_without_a_floor_is_named():
    class NewMixer(Mixer):
        pass

    with pytest.raises(TypeError, match="no cost of NewMixer"):
        costs.cost(NewMixer(None, 0), costs.Span(8))
