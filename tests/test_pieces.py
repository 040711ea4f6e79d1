"""On a CPU, mixers of Mamba read a long text a few tokens at a time, by themselves: nothing but the time changes."""

import pytest
import torch
from torch.testing import assert_close

from hf_arch.modeling.layers import mixer
from hf_arch.modeling.ops.documents import document_pieces
from promises import EXACT, ROWS

IN_PIECES = [case for case in ROWS if case.row.name in ("s6", "ssd")]


@pytest.mark.parametrize("case", IN_PIECES, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_pieces_equal_the_whole(case, padded, tokens, monkeypatch):
    model = case.build()
    inputs = {"input_ids": tokens, "labels": tokens, "position_ids": (torch.arange(70) % 31).expand(2, -1)}
    if padded:
        mask = torch.ones(2, 70, dtype=torch.long)
        mask[0, :25], mask[1, 60:] = 0, 0
        inputs = {"input_ids": tokens, "labels": tokens.masked_fill(mask == 0, -100), "attention_mask": mask}

    def answer():
        model.zero_grad()
        outputs = model(**inputs, use_cache=True)
        outputs.loss.backward()
        states = [layer.states for layer in outputs.past_key_values.layers]
        return outputs.logits[inputs["labels"] >= 0], states, [weight.grad.clone() for weight in model.parameters()]

    whole = answer()
    calls = []
    monkeypatch.setattr(mixer, "PIECE", 22)
    monkeypatch.setattr(mixer, "document_pieces", lambda *told: calls.append(told) or document_pieces(*told))
    assert_close(answer(), whole, **EXACT)
    assert len(calls) == model.config.num_hidden_layers


def test_a_document_that_goes_on_is_the_first_of_a_piece():
    documents = torch.tensor([[0, 0, 1, 1, 0, 1, 2, 2, 2, 3], [1, 1, 2, 2, 3, 3, 0, 0, 0, 0]])
    first, second, third, fourth = document_pieces(documents, 3)
    assert first.tolist() == [[0, 0, 1], [1, 1, 2]]
    assert second.tolist() == [[1, 0, 1], [1, 2, 2]]
    assert third.tolist() == [[2, 2, 2], [0, 0, 0]]
    assert fourth.tolist() == [[2], [0]]
    assert list(document_pieces(torch.ones(2, 5), 3)) == [None, None]
