"""Longformer against transformers', its checkpoints, and what its global tokens see."""

import json

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from originals import BERT, scaled_up
from safetensors.torch import load_file
from torch.testing import assert_close

from hf_arch import find
from hf_arch.convert import convert
from promises import EXACT, Case, some_tokens

ROW = find("longformer")
SIZES = BERT | {"max_position_embeddings": 130, "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-3}
SIZES |= {"attention_window": [8, 20], "sep_token_id": 2}
ROBERTA = {name: value for name, value in SIZES.items() if name != "attention_window"}
HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def build(head: str = "Model", **fields):
    return Case(ROW, head).build(**fields)


@pytest.fixture
def wide_softmax(monkeypatch, narrows_nowhere):
    """The original narrows its softmax to float32, in a float64 model too. Here it does not."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=None, dtype=None: softmax(x, dim=dim))


def original(head: str, folder):
    fields = {"num_labels": 2} if head == "ForQuestionAnswering" else {}
    made = scaled_up(getattr(transformers, f"Longformer{head}")(transformers.LongformerConfig(**SIZES | fields)))
    made.save_pretrained(folder)
    return made.double()


def inputs(questions: bool = False) -> dict[str, torch.Tensor]:
    """Two rows, the second with padding behind it. The original wants lengths that all windows divide."""
    ids = torch.randint(3, 61, (2, 80), generator=torch.Generator().manual_seed(1))
    if questions:
        ids[:, [7, 8, 60]] = 2
        ids[1, [7, 8, 9, 60]] = torch.tensor([2, 2, 5, 2])
    mask = torch.ones_like(ids)
    mask[1, 61:] = 0
    return {"input_ids": ids.where(mask > 0, 1), "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("global_tokens", [(), (0,), (0, 5, 50)], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_it_is_transformers(head, global_tokens, tmp_path, wide_softmax):
    peer, told = original(head, tmp_path), inputs(questions=True)
    ours = convert(tmp_path, "longformer").double()
    assert type(ours).__name__ == f"ArchLongformer{head}"
    marked = torch.zeros_like(told["input_ids"])
    marked[:, global_tokens] = 1
    if global_tokens:
        told["global_attention_mask"] = marked
    real = told["attention_mask"].bool()
    for found, expected in zip(answers(ours(**told)), answers(peer(**told)), strict=True):
        of_tokens = found.shape[:2] == real.shape
        assert_close(found[real] if of_tokens else found, expected[real] if of_tokens else expected, **EXACT)
        assert expected.std() > 0.1


def answers(outputs) -> list[torch.Tensor]:
    names = ("last_hidden_state", "logits", "start_logits", "end_logits")
    return [outputs[name] for name in names if name in outputs]


@torch.no_grad()
def test_choices_are_those_of_transformers(tmp_path, wide_softmax):
    peer, told = original("ForMultipleChoice", tmp_path), inputs(questions=True)
    told = {name: x[None] for name, x in told.items()}
    found, expected = convert(tmp_path, "longformer").double()(**told).logits, peer(**told).logits
    assert_close(found.diff(), expected.diff(), **EXACT)  # all but a number that all choices have in common
    assert expected.diff().abs() > 0.01


def test_a_longer_roberta(tmp_path):
    """Within the length that RoBERTa knows, a window over all makes it RoBERTa."""
    scaled_up(transformers.RobertaForMaskedLM(transformers.RobertaConfig(**ROBERTA))).save_pretrained(tmp_path)
    roberta = transformers.RobertaForMaskedLM.from_pretrained(tmp_path).double().eval()
    ours = convert(tmp_path, "longformer", attention_window=200, max_position_embeddings=300).double()
    told = inputs()
    real = told["attention_mask"].bool()
    with torch.no_grad():
        assert_close(ours(**told).logits[real], roberta(**told).logits[real], **EXACT)
    weights = ours.model.state_dict()
    for name in "qkv":
        assert torch.equal(
            weights[f"layers.1.mixer.{name}_global_proj.weight"], weights[f"layers.1.mixer.{name}_proj.weight"]
        )
    table = load_file(tmp_path / "model.safetensors")["roberta.embeddings.position_embeddings.weight"].double()
    longer = weights["embed_positions.embed_positions.weight"]
    assert len(longer) == 300 and torch.equal(longer[:128], table[2:]) and torch.equal(longer[128:256], table[2:])
    assert torch.equal(longer[256:], table[2:46])
    default = convert(tmp_path, "longformer").config
    assert default.attention_window == 512 and default.max_position_embeddings == 4096


@torch.no_grad()
def test_global_tokens_are_counted_in_real_tokens():
    """Padding at both ends and between, packed documents, tokens marked in each of them: as each text by itself."""
    model, tokens = build(), some_tokens(1, 60)[0]
    real = torch.tensor([0] * 3 + [1] * 20 + [0] * 4 + [1] * 40 + [0] * 5).bool()
    pieces, marks = tokens.split((25, 35)), torch.zeros(60, dtype=torch.long)
    marks[[3, 4, 30]] = 1
    ids = torch.full((72,), 7).masked_scatter(real, tokens)
    positions = torch.zeros_like(ids).masked_scatter(real, torch.cat((torch.arange(25), torch.arange(35))))
    marked = torch.ones_like(ids).masked_scatter(real, marks)  # padding that is marked stays padding
    told = {"attention_mask": real.long()[None], "position_ids": positions[None]}
    for given, alone in (
        (
            marked[None],
            [
                model(x[None], global_attention_mask=m[None])[0]
                for x, m in zip(pieces, marks.split((25, 35)), strict=True)
            ],
        ),
        (None, [model(x[None])[0] for x in pieces]),
    ):
        found = model(ids[None], global_attention_mask=given, **told)[0][:, real]
        assert_close(found, torch.cat(alone, dim=1), **EXACT)


@torch.no_grad()
def test_who_sees_whom():
    model, tokens = build(num_hidden_layers=1, attention_window=8, attention_dilation=1), some_tokens(1)
    marked = torch.zeros_like(tokens)
    marked[0, 33] = 1

    def influence(column: int, **told) -> torch.Tensor:
        changed = tokens.clone()
        changed[0, column] = (changed[0, column] + 1) % 90 + 3
        return (model(tokens, **told)[0] - model(changed, **told)[0])[0].abs().amax(-1) > 1e-9

    near = (torch.arange(70) - 20).abs() <= 4
    assert torch.equal(influence(20, global_attention_mask=torch.zeros_like(tokens)), near)
    near[33] = True
    assert torch.equal(influence(20, global_attention_mask=marked), near)
    assert influence(33, global_attention_mask=marked).all()
    assert torch.equal(
        influence(20), near.index_fill(0, torch.tensor([33]), False).index_fill(0, torch.tensor([0]), True)
    )


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification"])
def test_projections_without_a_token_get_a_gradient(head):
    model, tokens = build(head, num_global_tokens=0).train(), some_tokens()
    labels = tokens if head == "ForMaskedLM" else torch.tensor([0, 1])
    model(tokens, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    used = model.model.layers[0].mixer.q_global_proj.weight.grad.any()
    assert used == (head == "ForSequenceClassification")  # its first token sees all


@torch.no_grad()
def test_recorded_weights_are_those_of_all_pairs():
    model, tokens = build(), some_tokens()
    expected = model(tokens)[0]
    model.set_attn_implementation("eager")
    outputs = model(tokens, output_attentions=True)
    assert_close(outputs[0], expected, **EXACT)
    for weights in outputs.attentions:
        assert weights.shape == (2, 4, 70, 70)
        assert_close(weights.sum(-1), torch.ones(2, 4, 70).double(), **EXACT)
    assert (outputs.attentions[0][:, :, 0] > 0).all() and (outputs.attentions[0][:, :, :, 0] > 0).all()
    assert not outputs.attentions[0][:, :, 30, 35:].any()


def test_what_cannot_be(tmp_path):
    for fields, said in (
        ({"attention_window": 7}, "half of it is on each side, so it must be even"),
        ({"attention_window": [8, 8, 8]}, "attention_window has 3 entries for 2 layers"),
        ({"attention_window": 0}, "attention_window has 0; it must be at least 2"),
        ({"attention_dilation": [1, 0]}, "attention_dilation has 0; it must be at least 1"),
        ({"num_global_tokens": -1}, "it must not be negative"),
    ):
        with pytest.raises(StrictDataclassError, match=said):
            ROW.tiny_config(**fields)
    model, tokens = build(), some_tokens()
    with pytest.raises(ValueError, match=r"global_attention_mask is \[2, 9\], but the tokens \[2, 70\]"):
        model(tokens, global_attention_mask=torch.ones(2, 9))
    original("Model", tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="hidden_act"):
        convert(tmp_path, "longformer")


LABORATORY = {"residual_type": "post_norm", "norm_type": "layer_norm", "position_type": "learned", "norm_eps": 1e-5}
LABORATORY |= {"feed_forward_types": ["dense"] * 2, "hidden_act": "gelu", "attention_bias": True, "mlp_bias": True}
LABORATORY |= {"embedding_norm": True}


@torch.no_grad()
@pytest.mark.parametrize("window", [9, 70])
def test_a_decoder_without_first_tokens_is_a_transformer_with_windows(window):
    fields = {"attention_window": window, "num_global_tokens": 0}
    model, tokens = build("ForCausalLM", **fields), some_tokens()
    other = {"layer_types": ["sliding_attention"] * 2, "sliding_window": window, "num_key_value_heads": None}
    peer = Case(find("transformer"), "ForCausalLM").build(**LABORATORY, **other)
    peer.load_state_dict(model.state_dict())
    assert_close(model(tokens).logits, peer(tokens).logits, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("dilation", [1, 3])
def test_what_a_decoder_sees_and_keeps(dilation):
    model, tokens = (
        build("ForCausalLM", attention_window=5, attention_dilation=dilation, num_hidden_layers=1),
        some_tokens(1),
    )

    def influence(column: int) -> list[int]:
        changed = tokens.clone()
        changed[0, column] = (changed[0, column] + 1) % 90 + 3
        return ((model(tokens).logits - model(changed).logits)[0].abs().amax(-1) > 1e-9).nonzero().flatten().tolist()

    assert influence(20) == [20 + dilation * i for i in range(5)]
    assert influence(1) == list(range(1, 70)) and 2 + 5 * dilation not in influence(2)
    whole, cache = model(tokens).logits, None
    sizes = []
    for column in range(70):
        step = model(tokens[:, column : column + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        sizes.append(sum(state.numel() for state in cache.layers[0].states.values()))
        assert_close(step.logits[:, 0], whole[:, column], **EXACT)
    assert sizes == [2 * 32 * (2 + 4 * dilation) + 1] * 70


def test_a_decoder_has_its_own_global_tokens():
    model, tokens = build("ForCausalLM"), some_tokens()
    with pytest.raises(ValueError, match="set num_global_tokens in the config"):
        model(tokens, global_attention_mask=torch.ones_like(tokens))
    with pytest.raises(StrictDataclassError, match="causal_window_attention, not window_attention"):
        ROW.tiny_config(direction="causal", layer_types=["window_attention"] * 2)
    with pytest.raises(ValueError, match="ForCausalLM, or a causal one|take ForMaskedLM"):
        ROW.load("ForCausalLM")(ROW.tiny_config())
