"""What is near a query: ranks, the negatives that are mined, their picture, and pairs from texts alone."""

import pytest
import torch

from hf_arch import draw_ranks, hard_negatives, inverse_cloze, mean_reciprocal_rank, ranks, recall_at

AXES = torch.eye(4)
SWAPPED = AXES[[0, 1, 3, 2]] + 0.1 * AXES  # of the last two queries the other's document is nearer


def test_ranks_and_what_is_made_of_them():
    assert ranks(AXES, SWAPPED).tolist() == [1, 1, 2, 2]
    assert recall_at(AXES, SWAPPED) == 0.5 and recall_at(AXES, SWAPPED, 2) == 1.0
    assert mean_reciprocal_rank(AXES, SWAPPED) == pytest.approx(0.75)
    assert recall_at(torch.ones(4, 2), torch.ones(4, 2), 3) == 0.0  # vectors that are all the same find nothing
    assert ranks(AXES[:2], SWAPPED, own=[1, 0]).tolist() == [4, 4]
    many = torch.randint(-9, 10, (2500, 3), generator=torch.Generator().manual_seed(0)).float()  # products are exact
    assert ranks(many, many).tolist() == ((many @ many.T) >= (many * many).sum(1)[:, None]).sum(1).tolist()


def test_ranks_of_what_does_not_fit():
    with pytest.raises(ValueError, match="vectors of one size"):
        ranks(AXES, AXES[:, :3])
    with pytest.raises(ValueError, match="Query 4 has no document"):
        ranks(torch.ones(5, 4), AXES)


def test_hard_negatives_are_the_nearest_that_are_wrong():
    query, documents = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.9, 0], [0.88, 0], [0.5, 0], [0.7, 0], [1.0, 0]])
    assert hard_negatives(query, documents, count=2).tolist() == [[3, 2]]  # 0.88 and 1.0 may be right as well
    assert hard_negatives(query, documents, count=2, margin=0.0).tolist() == [[1, 3]]
    assert hard_negatives(query, documents, own=[2], count=2).tolist() == [[3, 1]]  # too few are left: the farthest
    assert hard_negatives(-query, documents, own=[0], count=1).tolist() == [[4]]  # scores below 0
    twice = torch.cat((documents, documents[:1]))  # the right text a second time
    assert 5 not in hard_negatives(query, twice, count=4, margin=0.0)[0, :3]


def test_hard_negatives_of_many_queries():
    vectors = torch.randn(1500, 8, generator=torch.Generator().manual_seed(0))
    documents = vectors[:300]
    own = torch.arange(1500) % 300
    found, scores = hard_negatives(vectors, documents, own, count=3), vectors @ documents.T
    right = scores.gather(1, own[:, None])
    allowed = (scores < right - 0.05 * right.abs()).sum(1) >= 3
    assert allowed.sum() > 500 and (found != own[:, None]).all()
    chosen = scores.gather(1, found)
    assert (chosen < right)[allowed].all() and (chosen[:, :-1] >= chosen[:, 1:])[allowed].all()


def test_what_cannot_be_mined():
    with pytest.raises(ValueError, match="of 4 documents one is right"):
        hard_negatives(AXES, AXES, count=4)
    with pytest.raises(ValueError, match="margin is -0.1"):
        hard_negatives(AXES, AXES, margin=-0.1)


def test_the_picture(tmp_path):
    found = {"before": (AXES, AXES.flip(0)), "after": (AXES, torch.cat((SWAPPED, AXES)))}
    draw_ranks(found, tmp_path / "new" / "search.png", maps=("before", "after"))
    assert (tmp_path / "new" / "search.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "new").iterdir())) == 1
    with pytest.raises(ValueError, match="no later to make a map of; there are before, after"):
        draw_ranks(found, tmp_path / "none.png", maps=("later",))
    assert not (tmp_path / "none.png").exists()


def test_pairs_from_texts_alone():
    said = [f"The sentence with number {n} has seven words." for n in range(9)]
    text = " ".join(said[:2]) + "\n\nA heading\n=========\n\n" + " ".join(said[2:]) + " Short one."
    train, held_out = inverse_cloze([text], characters=150)
    assert [pair["passage"] for pair in held_out] == [0, 1, 2]
    told = {pair["query"] for pair in train}
    for pair in held_out:
        assert pair["query"] in said and pair["query"] not in told and pair["query"] not in pair["positive"]
    for pair in train:
        whole = held_out[pair["passage"]]
        assert pair["query"] not in pair["positive"].removeprefix("A heading.")
        assert held_out[pair["passage"]]["query"] not in pair["positive"] and whole["positive"] != pair["positive"]
    headed = [pair["positive"].startswith("A heading. ") for pair in held_out]
    assert headed == [False, True, True] and sum(pair["query"] == "A heading" for pair in train) == 2
    assert inverse_cloze([text], characters=150, seed=1) != (train, held_out)
    with pytest.raises(ValueError, match="give more text, or longer passages"):
        inverse_cloze(["Too short to be asked."])
