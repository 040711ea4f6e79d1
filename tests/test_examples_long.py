"""The examples of long texts, in small: they run, and what they measure with is right."""

import re

import pytest

from examples import long_reading, story, summaries
from hf_arch.demo.text import python_manual

SHORT = {"max_steps": 2, "disable_tqdm": True, "use_cpu": True}
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}


@pytest.fixture
def files(tmp_path):
    """Some of the manual: enough to learn from and to hold out."""
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(document.text for document in python_manual()[:16]))
    return [str(path)]


def test_a_story_is_written_from_a_state_that_does_not_grow(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(story, "SIZES", story.SIZES | TINY | {"vocab_size": 300})
    monkeypatch.setattr(story, "PIECE", 16)
    curves = story.main("retnet", files, tmp_path / "out", longest=256, new_tokens=32, **SHORT)
    assert list(curves) == ["a Transformer", "RetNet"]
    assert all([at.first for at in of] == [1, 16, 32, 64, 128] and of[-1].last == 255 for of in curves.values())
    said = capsys.readouterr().out
    assert re.search(r"40 tokens of a story; its state took ([\d,]+) to \1 bytes", said)
    assert re.search(r"of +16 tokens: .*\nof +40 tokens: ", said)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"loss_by_position.png", "story.state"}


@pytest.mark.parametrize("repeated", [True, False])
def test_notes_are_told_and_asked(repeated):
    corpus = long_reading.split("the manual", python_manual()[:40])
    tokenizer = long_reading.train_tokenizer(corpus.train, 600)
    tokenizer.add_tokens([long_reading.MARK, *long_reading.LETTERS], special_tokens=True)
    stream = long_reading.Stream.of(corpus.held_out, tokenizer)
    texts, distances = long_reading.Notes(stream, tokenizer, 256, 60, repeated), []
    for text in texts:
        tokens, labels = text["input_ids"], text["labels"]
        assert len(tokens) == len(labels) == 256
        marks = [place for place, token in enumerate(tokens) if token == texts.mark]
        assert marks[-1] == 252 and (len(marks) >= 2 if repeated else len(marks) == 2)
        words = tokens[-3:]
        assert all(tokens[mark + 1 : mark + 4] == words for mark in marks)
        asked = [place for place, label in enumerate(labels) if label != -100]
        assert asked == [mark + n for mark in marks[1:] for n in (1, 2, 3)] and labels[-3:] == words
        distances.append(marks[-1] - marks[-2])
    assert (sorted(distances)[30] < 60) == repeated and max(distances) > 100 and min(distances) >= 4
    assert texts[3] == texts[3] and texts[3] != texts[4]


def test_long_reading(files, monkeypatch, capsys):
    monkeypatch.setattr(long_reading, "SIZES", long_reading.SIZES | TINY | {"vocab_size": 600})
    monkeypatch.setattr(long_reading, "TEXTS", 2)
    found = long_reading.main(files, (long_reading.END, 1024), **SHORT)
    assert list(found) == [f"{name}{part}" for name in long_reading.READERS for part in ("", ", the end")]
    held = {name: [size for _, size in of_lengths] for name, of_lengths in found.items()}
    assert held["recurrences"][0] == held["recurrences"][1]
    assert held["recurrence and attention"][1] > 2 * held["recurrence and attention"][0]
    assert held["recurrence and attention, the end"] == [held["recurrence and attention"][0]] * 2
    assert all(0 <= share <= 1 for of_lengths in found.values() for share, _ in of_lengths)
    assert "guessing" in capsys.readouterr().out


def test_summaries(monkeypatch, capsys):
    sizes = TINY | {"vocab_size": 400, "encoder_num_hidden_layers": 2, "num_hidden_layers": 1}
    monkeypatch.setattr(summaries, "SIZES", summaries.SIZES | sizes)
    monkeypatch.setattr(summaries, "SEGMENTS", 2)
    found, nats = summaries.main(["networkx"], most=40, **SHORT)
    assert {len(written) for written in found.values()} == {len(found["HAT encoder-decoder"])}
    assert all(found["the first sentence"]) and all(found["the words of the name"])
    read, other, trigrams = nats.values()
    assert read == pytest.approx(other, abs=0.5) and 4 < read < 8 and trigrams < read  # of 400 tokens, after two steps
    assert "wanted:" in capsys.readouterr().out
    assert summaries.overlap("Return the sum", "return a sum") == pytest.approx(2 / 3)
    assert summaries.overlap("one two three", "two three one", 2) == 0.5 and summaries.overlap("", "one") == 0.0
    with pytest.raises(ValueError, match="name more, or larger ones"):
        summaries.main(["json"])
