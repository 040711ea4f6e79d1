"""Write compressive_original.safetensors: weights of a small CompressiveTransformer of compressive-transformer-pytorch,
and what it answers in float64.

    python tests/goldens/make_compressive_original.py --peer FOLDER

FOLDER is what `pip install --no-deps --target FOLDER compressive-transformer-pytorch==0.4.0 mogrifier einops` makes.
It is asked for the paper's model: no gates, and each layer's memory is of what that layer read. Its positions are a
learned table that means other distances while the memories fill; here, before each segment, the table is told the
paper's relative keys for the keys that there are. Its loss is of the whole memory, which is what leaves where it is as
long as a segment.
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

SEGMENT, SIZE, HEADS, SLOTS = 8, 16, 2, 6


def relative_keys(weight: torch.Tensor, count: int) -> torch.Tensor:
    """[heads, distances, dim] of the distances below `count`."""
    exponent = torch.arange(0, SIZE, 2, dtype=torch.float64) / SIZE
    angle = torch.arange(count)[:, None] * 10000**-exponent
    return (torch.cat((angle.sin(), angle.cos()), dim=-1) @ weight.T).unflatten(-1, (HEADS, -1)).transpose(0, 1)


def answers() -> dict[str, torch.Tensor]:
    peer = importlib.import_module("compressive_transformer_pytorch")
    told = {"num_tokens": 40, "dim": SIZE, "seq_len": SEGMENT, "depth": 2, "mem_len": SEGMENT, "cmem_len": SLOTS}
    told |= {"cmem_ratio": 4, "heads": HEADS, "gru_gated_residual": False, "enhanced_recurrence": False}
    model, generator = peer.CompressiveTransformer(**told).double().train(), torch.Generator().manual_seed(0)
    made = {name: parameter for name, parameter in model.named_parameters() if name != "pos_emb"}
    made["relative"] = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    with torch.no_grad():
        for parameter in made.values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((1 + 0.2 * noise if parameter.ndim == 1 else 0.4 * noise).half())
    ids, memories, logits, losses = torch.randint(40, (2, 56), generator=generator), None, [], []
    for piece in ids.split(SEGMENT, dim=1):
        keys = SEGMENT + (0 if memories is None else sum(x.shape[2] for x in memories))
        model.pos_emb.data[:, :keys] = relative_keys(made["relative"], keys).flip(1)
        answer, memories, loss = model(piece, memories=memories)
        logits.append(answer[:, -1:].detach())
        losses.append(loss.detach() * model.depth)  # it divides the sum over the layers
    weights = {f"weights.{name}": x.detach().half() for name, x in made.items()}
    loss = torch.stack([x.squeeze() for x in losses])[1:].mean()  # nothing leaves with the first segment
    return weights | {"ids": ids, "logits": torch.cat(logits, dim=1), "loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="a folder with compressive-transformer-pytorch 0.4.0")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("compressive_original.safetensors"))
    options = parser.parse_args()
    sys.path.insert(0, options.peer)
    save_file({name: x.contiguous() for name, x in answers().items()}, options.output)
    print(f"{options.output}: {options.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
