"""The catalogue as a table."""

from hf_arch.architecture import DECODER, ENCODER, ENCODER_DECODER, Architecture
from hf_arch.catalogue import ARCHITECTURES

SETS_OF_HEADS = {"decoder": DECODER, "encoder": ENCODER, "encoder-decoder": ENCODER_DECODER}


def markdown() -> str:
    """The catalogue as the README shows it."""
    lines = ["| architecture | name | paper | heads | cannot keep |", "|---|---|---|---|---|"]
    for row in ARCHITECTURES:
        paper = f"[{row.paper}](https://arxiv.org/abs/{row.paper.removeprefix('arXiv:')})"
        broken = " ".join(f"**{promise}**: {reason}" for promise, reason in row.exceptions.items()) or "-"
        lines.append(f"| {row.title} ({row.family}) | `{row.name}` | {paper} | {heads_in_words(row)} | {broken} |")
    sets = (f"{name}: {', '.join(heads)}" for name, heads in SETS_OF_HEADS.items())
    return "\n".join([*lines, "", f"Heads of a {'; of an '.join(sets)}."])


def heads_in_words(row: Architecture) -> str:
    for name, heads in reversed(SETS_OF_HEADS.items()):
        if set(heads) <= set(row.heads):
            return ", ".join([name, *(head for head in row.heads if head not in heads)])
    return ", ".join(row.heads)
