"""BigBird against transformers', its checkpoints, its global tokens and what its decoder reads."""

import json

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from originals import BERT, scaled_up
from torch.testing import assert_close
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

from hf_arch import find
from hf_arch.convert import convert
from hf_arch.modeling.ops.random_blocks import BlockChoice
from promises import EXACT, Case, some_tokens

ROW = find("bigbird")
SIZES = BERT | {"max_position_embeddings": 130, "block_size": 4, "num_random_blocks": 3, "layer_norm_eps": 1e-3}
HEADS = ("Model", "ForMaskedLM", "ForPreTraining", "ForTokenClassification")


def build(head: str = "Model", **fields):
    return Case(ROW, head).build(**fields)


def original(head: str, folder):
    made = scaled_up(getattr(transformers, f"BigBird{head}")(transformers.BigBirdConfig(**SIZES)))
    made.save_pretrained(folder)
    return made.double()


def ids(length: int = 80) -> torch.Tensor:
    return torch.randint(3, 61, (2, length), generator=torch.Generator().manual_seed(1))


def all_the_first(self, place, top, longest, layer):
    """The random blocks of transformers in evaluation."""
    return torch.zeros(len(place), self.random, dtype=torch.long)


@torch.no_grad()
@pytest.mark.parametrize("length", [80, 79, 61])
@pytest.mark.parametrize("head", HEADS)
def test_it_is_transformers_with_its_random_blocks(head, length, tmp_path, monkeypatch):
    peer, tokens = original(head, tmp_path), ids(length)
    ours = convert(tmp_path, "bigbird").double()
    assert type(ours).__name__ == f"ArchBigBird{head.replace('PreTraining', 'MaskedLM')}"
    other = ours(tokens)[0]
    monkeypatch.setattr(BlockChoice, "at_random", all_the_first)
    found, expected = ours(tokens)[0], peer(tokens)[0]
    assert_close(found, expected, **EXACT)
    assert expected.std() > 0.1 and (other - expected).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_transformers_with_ours_is_ours(training, tmp_path, monkeypatch):
    """Also in training: there they are the same."""
    peer, tokens = original("Model", tmp_path), ids()
    ours = convert(tmp_path, "bigbird").double()
    chosen = ours.config.block_choice

    def plan(self, from_seq_length, num_heads, **told):
        count = from_seq_length // 4
        place = torch.arange(1, count - 1)[:, None]
        found = chosen.at_random(place, torch.full_like(place, count - 1), count, self.seed)
        return [found.numpy().astype(np.int32)] * num_heads

    monkeypatch.setattr(BigBirdBlockSparseAttention, "_bigbird_block_rand_mask_with_head", plan)
    for model in (peer, ours):
        model.train(training)
        for module in model.modules():
            module.p = 0.0
            module.attention_dropout = 0.0
    assert_close(ours(tokens)[0], peer(tokens)[0], **EXACT)


@torch.no_grad()
def test_choices_are_those_of_transformers(tmp_path, monkeypatch):
    peer, tokens = original("ForMultipleChoice", tmp_path), ids()[None]
    ours = convert(tmp_path, "bigbird").double()
    monkeypatch.setattr(BlockChoice, "at_random", all_the_first)
    found, expected = ours(tokens).logits, peer(tokens).logits
    assert_close(found.diff(), expected.diff(), **EXACT)  # all but a number that all choices have in common
    assert expected.diff().abs() > 0.01


def test_what_is_not_converted_is_named(tmp_path):
    original("Model", tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for change in ({"attention_type": "original_full"}, {"rescale_embeddings": True}, {"use_bias": False}):
        (tmp_path / "config.json").write_text(json.dumps(fields | change))
        with pytest.raises(ValueError, match=next(iter(change))):
            convert(tmp_path, "bigbird")
    (tmp_path / "config.json").write_text(json.dumps(fields | {"architectures": ["BigBirdForQuestionAnswering"]}))
    with pytest.raises(ValueError, match="BigBirdForQuestionAnswering has no counterpart"):
        convert(tmp_path, "bigbird")


def influence(model, column: int) -> torch.Tensor:
    """[length] whether the answers change when the token at `column` does."""
    tokens = some_tokens(1)
    changed = tokens.clone()
    changed[0, column] = (changed[0, column] + 1) % 90 + 3
    with torch.no_grad():
        return (model(tokens)[0] - model(changed)[0])[0].abs().amax(-1) > 1e-9


def test_who_sees_whom():
    few = {"num_hidden_layers": 1, "num_random_blocks": 0}
    near = torch.arange(70) // 4
    internal = (near >= 4) & (near <= 6) | (near == 0) | (near == 17)
    assert torch.equal(influence(build(**few), 20), internal)
    assert influence(build(**few), 3).all() and influence(build(**few), 69).all()
    extended = {"num_extra_global_tokens": 5}
    assert torch.equal(influence(build(**few, **extended), 20), (near >= 4) & (near <= 6))
    assert influence(build(**extended | {"num_random_blocks": 0}), 20).all()  # by the global tokens, in two layers
    decoder = influence(build("ForCausalLM", **few), 20)
    assert torch.equal(decoder, (torch.arange(70) >= 20) & (near <= 7))


@torch.no_grad()
def test_global_tokens_are_not_among_the_answers():
    model, tokens = build(num_extra_global_tokens=5), some_tokens()
    outputs = model(tokens, output_hidden_states=True)
    assert [x.shape for x in outputs.hidden_states] == [(2, 70, 32)] * 3
    assert_close(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert_close(model(tokens, return_dict=False)[0], outputs.last_hidden_state)
    with pytest.raises(ValueError, match=r"attention_mask is \[2, 69\] for 2 rows of 70"):
        model(tokens, attention_mask=torch.ones(2, 69))


@torch.no_grad()
@pytest.mark.parametrize("head", ["ForMaskedLM", "ForCausalLM"])
def test_all_blocks_are_full_attention(head):
    """A text of any length, through the whole model: a Transformer of the laboratory."""
    model, tokens = build(head, num_random_blocks=100, type_vocab_size=0, norm_eps=1e-5), some_tokens()
    kind = "bidirectional_attention" if head == "ForMaskedLM" else "full_attention"
    fields = {"residual_type": "post_norm", "norm_type": "layer_norm", "position_type": "learned", "norm_eps": 1e-5}
    fields |= {"feed_forward_types": ["dense"] * 2, "hidden_act": "gelu_pytorch_tanh", "attention_bias": True}
    fields |= {"mlp_bias": True, "embedding_norm": True, "num_key_value_heads": None, "layer_types": [kind] * 2}
    peer = Case(find("transformer"), head).build(**fields)
    peer.load_state_dict(model.state_dict())
    assert_close(model(tokens).logits, peer(tokens).logits, **EXACT)


@torch.no_grad()
def test_the_future_never_changes_the_past():
    model, tokens = build("ForCausalLM", initializer_range=0.5), some_tokens(1, 200)
    whole = model(tokens).logits
    for length in (1, 4, 63, 150):
        assert_close(model(tokens[:, :length]).logits, whole[:, :length], **EXACT)


@torch.no_grad()
def test_a_step_reads_only_what_it_sees():
    model, tokens = build("ForCausalLM", num_hidden_layers=1), some_tokens(1, 200)
    whole = model(tokens).logits
    cache = model(tokens[:, :199], use_cache=True).past_key_values
    seen = model.config.block_choice.seen(torch.tensor([49]), torch.tensor([50]), 50, 0)[0].tolist()
    unseen = [column for column in range(199) if column // 4 not in seen]
    assert len(unseen) > 160
    held = cache.layers[0]
    held.keys, held.values = (x.index_fill(2, torch.tensor(unseen), float("nan")) for x in (held.keys, held.values))
    assert_close(model(tokens[:, 199:], past_key_values=cache).logits, whole[:, 199:], **EXACT)


def test_what_cannot_be():
    for fields, said in (
        ({"num_window_blocks": 2}, "so it is odd"),
        ({"block_size": 0}, "block_size is 0; it must be at least 1"),
        ({"num_random_blocks": -1}, "must be at least 0"),
        ({"direction": "causal", "num_extra_global_tokens": 2}, "which is the future"),
        (
            {"direction": "causal", "layer_types": ["block_sparse_attention"] * 2},
            "causal_block_sparse_attention, not block_sparse_attention",
        ),
    ):
        with pytest.raises(StrictDataclassError, match=said):
            ROW.tiny_config(**fields)
    with pytest.raises(ValueError, match="take ForMaskedLM"):
        ROW.load("ForCausalLM")(ROW.tiny_config())
