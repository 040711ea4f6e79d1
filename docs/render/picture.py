"""Which tokens of a text each answer hears of: measured on a tiny model of a row, drawn by matplotlib."""

import io

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from torch import nn

from hf_arch.architecture import Architecture

LENGTH = 48
STEP = 1e-6  # of the change of an embedding: small enough that choices (buckets, experts, chunks) stay as they are
NOTHING = 1e-8  # of the largest: less is rounding
DECADES = 4  # of the scale; what is fainter has its last colour, and what is nothing is white
COLORS = LinearSegmentedColormap.from_list("influence", ["#dcebf1", "#5aa3bf", "#0b6e99", "#062f44"])
PANEL, EDGES = 2.5, (0.6, 0.15, 0.5, 0.35)  # inches: of a square, and left, right, below and above it


def picture(row: Architecture, panels: dict[str, dict]) -> bytes:
    """A PNG with a panel for each of `panels`: a title, and the fields of the tiny config that it is of."""
    drawn = {}
    for title, fields in panels.items():
        for stream, changes in influences(build(row, fields)).items():
            drawn[", ".join(filter(None, [title, stream]))] = changes
    columns = min(4, len(drawn))
    lines = -(-len(drawn) // columns)
    left, right, below, above = EDGES
    width, height = (PANEL + left + right) * columns, (PANEL + below + above) * lines
    figure = Figure(figsize=(width, height), dpi=80)
    for number, (title, changes) in enumerate(drawn.items()):
        line, column = divmod(number, columns)
        corner = left + (PANEL + left + right) * column, height - (PANEL + below + above) * (line + 1) + below
        square = corner[0] / width, corner[1] / height, PANEL / width, PANEL / height
        draw(figure.add_axes(square), title, changes)
    written = io.BytesIO()
    figure.savefig(written, format="png", metadata={"Software": None})
    return written.getvalue()


def build(row: Architecture, fields: dict) -> nn.Module:
    """The row's tiny model with these fields, in float64, its weights so large that layers show beside residuals."""
    torch.manual_seed(0)
    model = row.load("Model")(row.tiny_config(**({"num_hidden_layers": 1, "initializer_range": 0.2} | fields))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.std() < 0.01:  # a matrix that begins at nothing
                parameter.normal_(std=model.config.initializer_range)
    return model.double()


def influences(model: nn.Module) -> dict[str, torch.Tensor]:
    """[answers, tokens] of each pair of a stack that reads and one that answers, under its name."""
    if not model.config.is_encoder_decoder:
        return {"": influence(model, model)["last_hidden_state"]}
    of_source = influence(model, model.encoder)
    return {
        "encoder": of_source["encoder_last_hidden_state"],
        "decoder": influence(model, model.decoder)["last_hidden_state"],
        "decoder of source": of_source["last_hidden_state"],
    }


@torch.no_grad()
def influence(model: nn.Module, reader: nn.Module) -> dict[str, torch.Tensor]:
    """|change of answer i| for a small change of the embedding of token j of what `reader` reads, as [i, j].

    The same text, no token of it twice, stands in the batch once as it is, and once for each token that is changed: one
    call tells all.
    """
    tokens = torch.randperm(90, generator=torch.Generator().manual_seed(1))[:LENGTH].expand(LENGTH + 1, -1) + 3
    size = reader.embed_tokens(tokens[:1]).shape[-1]
    direction = torch.randn(size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    changes = STEP * torch.eye(LENGTH, dtype=torch.float64)[..., None] * direction
    changes = torch.cat((torch.zeros_like(changes[:1]), changes))
    hook = reader.embed_tokens.register_forward_hook(lambda module, arguments, embedded: embedded + changes)
    try:
        answer = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
        output = model(input_ids=tokens, use_cache=False, **answer)
    finally:
        hook.remove()
    names = [name for name in ("last_hidden_state", "encoder_last_hidden_state") if name in output]
    return {name: (output[name][1:] - output[name][:1]).norm(dim=-1).T for name in names}


def draw(axes: Axes, title: str, changes: torch.Tensor) -> None:
    top = float(changes.max())
    faintest = top / 10**DECADES
    shown = changes.clamp(min=faintest).masked_fill(changes < NOTHING * top, torch.nan)
    axes.imshow(shown.numpy(), cmap=COLORS, norm=LogNorm(faintest, top), interpolation="nearest")
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("token j, which is changed", fontsize=8)
    axes.set_ylabel("answer i, which changes", fontsize=8)
    axes.tick_params(labelsize=7)
