"""What is booked, after each turn of a dialogue: `python examples/dialogue_state.py`.

The dialogues are generated: a guest books a table, names what is wanted and names it anew, takes or declines what is
offered, speaks of other days, and adds one more person. HAT reads a turn as a segment. It learns from dialogues read as
a whole; then it follows new ones turn by turn, without reading old turns again. Beside it: what the guest mentioned
last.
"""

import random
from tempfile import TemporaryDirectory

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

import hf_arch
from hf_arch.demo.text import Document
from hf_arch.demo.tokens import train_tokenizer

SLOTS = {
    "food": ["italian", "thai", "french", "indian"],
    "day": ["monday", "tuesday", "wednesday", "thursday", "friday"],
    "time": ["seven", "eight", "nine", "ten"],
    "people": ["two", "three", "four", "five"],
}
SAID = {"food": "{} food", "day": "on {}", "time": "at {}", "people": "for {}"}
VALUES = [(slot, value) for slot, values in SLOTS.items() for value in [None, *values]]  # None: not said yet
PLACES = {slot: [place for place, (of, _) in enumerate(VALUES) if of == slot] for slot in SLOTS}
GIVE = ["a table {0} please", "{0} please", "we would like to come {0}", "{0} would be best"]
CHANGE = ["sorry , {1} and not {0}", "could we come {1} instead of {0} ?", "not {0} , {1}", "{0} was wrong , {1} it is"]
PAST = ["last time we came {0} and liked it", "is it always so full {0} ?"]
EXCHANGES = 5
HAT = hf_arch.find("hat")
SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "type_vocab_size": 4}
SIZES |= {"segment_lengths": [24], "max_position_embeddings": 24 * 16, "document_pooling": "leader"}
SIZES |= {"layer_types": ["level_0", "pool_0", "level_1", "level_1", "pool_1"], "num_hidden_layers": 5}
SIZES |= {"feed_forward_types": ["dense", "none", "dense", "dense", "none"]}

State = dict[str, str | None]
Dialogue = list[tuple[dict[str, str], State]]  # messages, each with what is booked after it


def guest(draw: random.Random, state: State, offer: tuple[str, str] | None) -> tuple[str, State]:
    """What the guest says, and what it changes."""
    if offer is not None and draw.random() < 0.7:
        return draw.choice([("yes , that is fine", dict([offer])), ("no , then leave it as it is", {})])
    slot = draw.choice(list(SLOTS))
    old, new = state[slot], draw.choice([value for value in SLOTS[slot] if value != state[slot]])
    if draw.random() < 0.15:
        return draw.choice(PAST).format(SAID[slot].format(new)), {}
    if slot == "people" and old not in (None, "five") and draw.random() < 0.5:
        return "one more of us is coming", {slot: SLOTS[slot][SLOTS[slot].index(old) + 1]}
    said = [SAID[slot].format(value) for value in (old, new)]
    return (draw.choice(GIVE).format(said[1]) if old is None else draw.choice(CHANGE).format(*said)), {slot: new}


def waiter(draw: random.Random, state: State) -> tuple[str, tuple[str, str] | None]:
    """What the waiter says, and offers in the place of what was asked for."""
    told = [slot for slot, value in state.items() if value]
    if not told or draw.random() < 0.5:
        return draw.choice(["noted , anything else ?", "very well", "gladly , and what more ?"]), None
    slot = draw.choice(told)
    new = draw.choice([value for value in SLOTS[slot] if value != state[slot]])
    said = [SAID[slot].format(value) for value in (state[slot], new)]
    return "we are full {} , would {} do ?".format(*said), (slot, new)


def dialogue(draw: random.Random) -> Dialogue:
    state: State = dict.fromkeys(SLOTS)
    turns, offer = [], None
    for _ in range(EXCHANGES):
        text, change = guest(draw, state, offer)
        state = state | change
        turns.append(({"role": "user", "content": text}, state))
        text, offer = waiter(draw, state)
        turns.append(({"role": "assistant", "content": text}, state))
    return turns


def last_mention(turns: Dialogue) -> State:
    words = " ".join(message["content"] for message, _ in turns if message["role"] == "user").split()
    return {slot: next((word for word in reversed(words) if word in SLOTS[slot]), None) for slot in SLOTS}


def trained(dialogues: list[Dialogue], folder: str, **options):
    """A model that says after any turn which of VALUES hold, and its processor."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([Document("", message["content"]) for turns in dialogues for message, _ in turns], 512)
    processor = HAT.load("Processor")(tokenizer, segment_length=24)
    told = {"num_labels": len(VALUES), "problem_type": "multi_label_classification"}
    model = HAT.load("ForSequenceClassification")(HAT.load("Config")(vocab_size=len(tokenizer), **told, **SIZES))
    rows = []
    for turns in dialogues:
        for end in range(1, len(turns) + 1, 2):
            state = turns[end - 1][1]
            labels = [float(state[slot] == value) for slot, value in VALUES]
            rows.append(dict(processor.dialogue([message for message, _ in turns[:end]])) | {"labels": labels})
    arguments = TrainingArguments(folder, learning_rate=4e-3, warmup_steps=50, report_to=[], **options)
    trainer = Trainer(model, arguments, data_collator=DataCollatorWithPadding(processor), train_dataset=rows)
    trainer.train()
    return model.eval(), processor


@torch.no_grad()
def follow(model, processor, dialogues: list[Dialogue]) -> tuple[list[list[State]], list[int]]:
    """After each turn, what is booked in each dialogue; and the FLOPs that all of them took to read it."""
    past, states, costs = None, [], []
    for turn in range(2 * EXCHANGES):
        messages = [[message for message, _ in turns[: turn + 1]] for turns in dialogues]
        told = processor.dialogue(messages, since=turn, padding=True, return_tensors="pt")
        with FlopCounterMode(display=False) as counter:
            found, past = model.model.read_turn(past, **told)
        scores = model.scores(found, None, None)
        best = [{slot: int(row[places].argmax()) for slot, places in PLACES.items()} for row in scores]
        states.append([{slot: VALUES[PLACES[slot][place]][1] for slot, place in each.items()} for each in best])
        costs.append(counter.get_total_flops())
    return states, costs


if __name__ == "__main__":
    draw = random.Random(0)
    train, held_out = ([dialogue(draw) for _ in range(count)] for count in (800, 200))
    with TemporaryDirectory() as folder:
        options = {
            "num_train_epochs": 5,
            "per_device_train_batch_size": 16,
            "logging_steps": 250,
            "save_strategy": "no",
        }
        model, processor = trained(train, folder, **options)
    states, costs = follow(model, processor, held_out)
    print(
        f"{len(held_out)} generated dialogues. All of what is booked is right, by HAT and by what was mentioned last:"
    )
    for turn in range(0, 2 * EXCHANGES, 2):
        truth = [turns[turn][1] for turns in held_out]
        said = [last_mention(turns[: turn + 1]) for turns in held_out]
        shares = (sum(map(dict.__eq__, truth, found)) / len(truth) for found in (states[turn], said))
        print(f"after turn {turn + 1}: {{:6.1%}} {{:6.1%}}".format(*shares))
    second, tenth, total = (cost / len(held_out) / 1e6 for cost in (costs[1], costs[9], sum(costs)))
    print(f"Reading takes {second:.1f} million FLOPs of the second turn, {tenth:.1f} of the tenth, {total:.1f} of all.")
