"""Made texts with labels, for tasks whose real ones are nobody's to give away: medical records and financial news.

A record is a few sentences of templates in random order, filled with names, drugs, doses and dates from the lists
below; what each place was filled with is its label. What a word is, its sentence says: penicillin is a drug where it is
taken and an allergen where it is not borne, Weber a patient or a doctor (who has no label), 12 an age, a dose or a
date. A news line says that something rises or falls, and is good news by what it is: profits or losses. What is said
of the year before, or only feared, does not count. Half of all names are kept for the texts that are held out. So a
model has to read the sentence; yet it is the sentence of a generator, far from how physicians and journalists write.
"""

import random
import re

NAMES = "Keller Weber Novak Rossi Haas Lind Moreau Santos Okafor Tanaka Ivanov Berg Costa Dahl Engel Farkas"
DRUGS = (
    "metformin ramipril atenolol ibuprofen penicillin warfarin insulin aspirin codeine naproxen diazepam digoxin "
    "amoxicillin furosemide lisinopril morphine heparin prednisone simvastatin tramadol"
)
ILLNESSES = (
    "diabetes asthma pneumonia migraine anaemia gout hypertension eczema bronchitis arthritis epilepsy sepsis "
    "tonsillitis sciatica psoriasis pancreatitis"
)
DOSES = (5, 10, 20, 25, 40, 50, 75, 100, 250, 500)
OFTEN = ["once daily", "twice daily", "three times a day", "every six hours", "at night", "before meals"]
DATES = [f"{day} {month}" for month in ("January", "March", "June", "October") for day in (2, 5, 12, 19, 23, 30)]
RECORD = [
    [
        "{PATIENT}, aged {AGE}, was admitted on {DATE} with {ILLNESS}.",
        "Patient {PATIENT}, {AGE} years, {ILLNESS}.",
    ],
    ["Seen by Dr {doctor} on {DATE}.", "Referred by Dr {doctor}.", "Dr {doctor} reviewed the case on {DATE}."],
    ["Takes {DRUG} {DOSE} {OFTEN}.", "Started on {DRUG} {DOSE} {OFTEN}.", "{DRUG} {DOSE} was given {OFTEN}."],
    ["Continues {DRUG} {DOSE}.", "{DRUG} was stopped on {DATE}.", "Changed from {DRUG} to {DRUG} {DOSE}."],
    ["Allergic to {ALLERGEN}.", "Rash after {ALLERGEN}.", "Does not tolerate {ALLERGEN}.", "No known allergies."],
    ["History of {ILLNESS} and {ILLNESS}.", "Known {ILLNESS} since childhood.", "The father had gout."],
]
GOOD = ["profit", "revenue", "cash flow", "sales", "order intake", "the operating margin", "earnings", "demand"]
BAD = ["losses", "debt", "costs", "credit defaults", "customer complaints", "write-downs", "staff turnover", "delays"]
UP = ["rose", "grew", "climbed", "increased", "jumped", "went up"]
DOWN = ["fell", "dropped", "shrank", "declined", "slid", "went down"]
FLAT = [
    "were reported on {date}",
    "will be published on {date}",
    "stayed where it was",
    "are unchanged",
    "met forecasts",
]
ASIDE = [
    "",
    ", after it {other} a year ago",
    ", where analysts had feared that it {other}",
    " since {date}",
    " by {n} %",
]
SENTIMENTS = ("negative", "neutral", "positive")


def half(words: str, held_out: bool) -> list[str]:
    return words.split()[held_out::2]


def record(draw: random.Random, held_out: bool) -> dict:
    """{"text":..., "entities": [{"start", "end", "label"},...]}, in characters."""
    drugs = half(DRUGS, held_out)
    fill = {
        "PATIENT": lambda: draw.choice(["Mr ", "Mrs ", "Ms "]) + draw.choice(half(NAMES, held_out)),
        "doctor": lambda: draw.choice(half(NAMES, held_out)),
        "AGE": lambda: str(draw.randrange(18, 96)),
        "DATE": lambda: draw.choice(DATES),
        "ILLNESS": lambda: draw.choice(half(ILLNESSES, held_out)),
        "DRUG": lambda: draw.choice(drugs),
        "ALLERGEN": lambda: draw.choice(drugs),
        "DOSE": lambda: f"{draw.choice(DOSES)} mg",
        "OFTEN": lambda: draw.choice(OFTEN),
    }
    first, *others = (draw.choice(sentences) for sentences in RECORD)
    template = " ".join([first, *draw.sample(others, draw.randrange(2, len(others) + 1))])
    text, entities = "", []
    for part in re.split(r"(\{\w+\})", template):
        label = part[1:-1] if part[:1] == "{" else None
        said = fill[label]() if label else part
        if label and label.isupper():
            entities.append({"start": len(text), "end": len(text) + len(said), "label": label})
        text += said
    return {"text": text, "entities": entities}


def headline(draw: random.Random, held_out: bool) -> dict:
    """{"text":..., "label": one of SENTIMENTS}."""
    good, up = draw.random() < 0.5, draw.random() < 0.5
    what = draw.choice(GOOD if good else BAD)
    fill = {"date": draw.choice(DATES), "n": draw.randrange(2, 60)}
    if draw.random() < 1 / 3:
        said, label = draw.choice(FLAT).format(**fill), "neutral"
    else:
        told, other = (UP, DOWN) if up else (DOWN, UP)
        said = draw.choice(told) + draw.choice(ASIDE).format(other=draw.choice(other), **fill)
        label = "positive" if good == up else "negative"
    return {
        "text": f"{draw.choice(half(NAMES, held_out))} {draw.choice(['plc', 'AG', 'Inc'])}: {what} {said}.",
        "label": label,
    }
