"""Hidden tokens and hidden sentences: what is hidden, what is asked, and that it can be learned."""

import pytest
import torch
import torch.nn.functional as F
from test_hat_processor import make, tokenizer  # noqa: F401
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from hf_arch import SentenceMaskCollator, find
from promises import Case, some_tokens

ROW = find("hat")
MASK, TEXTS = 3, ["a b c. d e f. g h i. j k l.", "m n.", "o p. q r. s t."]


@pytest.fixture
def processor(make):  # noqa: F811
    return make(segmentation="sentence", segment_length=5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_and_sentences_are_hidden(processor, side, monkeypatch):
    monkeypatch.setattr(processor.tokenizer, "padding_side", side)
    torch.manual_seed(0)
    items = [dict(processor(text)) for text in TEXTS * 20]
    batch = SentenceMaskCollator(processor, mlm_probability=0.3, sentence_probability=0.4)(items)
    ids, original, hidden = batch["input_ids"], batch["original_ids"], batch["hidden_segments"]
    counts = hidden.sum(1)
    assert (counts[1::3] == 0).all() and (counts[0::3] >= 1).all() and (counts[0::3] <= 3).all()
    assert counts[0::3].float().mean() > 1.2
    assert (batch["segment_starts"][hidden > 0] == 1).all() and (ids[hidden > 0] == original[hidden > 0]).all()
    named, real = batch["labels"] != -100, batch["attention_mask"] > 0
    assert (batch["labels"][named] == original[named]).all() and not named[~real].any()
    assert 0.08 < named.sum() / real.sum() < 0.2  # not leaders, nor within hidden sentences
    segment = (batch["segment_starts"] * real).cumsum(1) * real
    for row in range(len(ids)):
        for number in range(1, int(segment[row].max()) + 1):
            members = (segment[row] == number).nonzero().squeeze(-1)
            leader, *others = members.tolist()
            if hidden[row, leader]:
                assert (ids[row, others] == MASK).all() and not named[row, members].any()
            else:
                assert torch.equal(
                    ids[row, members][~named[row, members]], original[row, members][~named[row, members]]
                )


def test_what_the_collator_cannot_do(processor):
    with pytest.raises(ValueError, match="mlm_probability is 1.5: a share"):
        SentenceMaskCollator(processor, mlm_probability=1.5)
    bare = PreTrainedTokenizerFast(tokenizer_object=processor.tokenizer.backend_tokenizer, cls_token="<s>")
    with pytest.raises(ValueError, match="no mask_token"):
        SentenceMaskCollator(ROW.load("Processor")(bare))


@torch.no_grad()
def test_the_loss_is_its_definition():
    model, tokens = Case(ROW, "ForPreTraining").build(), some_tokens(2, 60)
    original = some_tokens(2, 60, seed=4)
    mask, starts, hidden = torch.ones_like(tokens), torch.zeros_like(tokens), torch.zeros_like(tokens)
    mask[1, 50:] = 0
    starts[:, ::10], hidden[0, [10, 30]], hidden[1, [40, 20]] = 1, 1, 1
    original[1, 20:30] = original[0, 30:40]  # the same sentence is no wrong answer
    told = {"attention_mask": mask, "segment_starts": starts}
    found = model(tokens, labels=tokens, original_ids=original, hidden_segments=hidden, **told)
    plain = Case(ROW, "ForMaskedLM").build()
    plain.load_state_dict({name: x for name, x in model.state_dict().items() if "foretell" not in name})
    assert_close(found.token_loss, plain(tokens, labels=tokens, **told).loss)
    states = model.model(tokens, **told)[0]
    foretold = model.foretell(torch.stack([states[0, 10], states[0, 30], states[1, 20], states[1, 40]]))
    places = ((0, 10), (0, 30), (1, 20), (1, 40))
    read = torch.cat([model.model(original[row : row + 1, at : at + 10])[0][:, 0] for row, at in places])
    scores = torch.stack([F.cosine_similarity(one, read) for one in foretold]) / 0.05
    scores[1, 2] = scores[2, 1] = -1e30
    assert_close(found.segment_loss, F.cross_entropy(scores, torch.arange(4)))
    assert_close(found.loss, found.token_loss + found.segment_loss)
    assert_close(model(tokens, labels=tokens, **told).loss, found.token_loss.double())
    assert model(tokens, labels=tokens, original_ids=original, hidden_segments=hidden * 0, **told).segment_loss == 0
    with pytest.raises(ValueError, match="without original_ids"):
        model(tokens, hidden_segments=hidden)


def test_it_can_be_learned(processor):
    """Each text is of one letter: a hidden sentence is known by those beside it."""
    torch.manual_seed(0)
    model = ROW.load("ForPreTraining")(ROW.tiny_config("ForPreTraining"))
    texts = [". ".join([" ".join([letter] * 3)] * 3) + "." for letter in "abcdefghijklmnop"]
    collate = SentenceMaskCollator(processor, sentence_probability=0.1)
    items = [dict(processor(text)) for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses, right = [], []
    for _ in range(80):
        found = model(**collate(items))
        found.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        right.append((found.segment_logits.argmax(1) == torch.arange(len(found.segment_logits))).float().mean())
        losses.append((found.token_loss.item(), found.segment_loss.item()))
    first, last = torch.tensor(losses[:5]).mean(0), torch.tensor(losses[-5:]).mean(0)
    assert (last < 0.5 * first).all(), (first, last)
    assert torch.stack(right[-5:]).mean() > 0.6  # one of 16 by chance
