"""Write megabyte_lucidrains.safetensors: weights of small models of lucidrains' MEGABYTE-pytorch, and the hidden states
that they answer in float64, read where the paper has them.

    python tests/goldens/make_megabyte_lucidrains.py --peer FOLDER

FOLDER is where `pip install --no-deps --target FOLDER MEGABYTE-pytorch==0.3.6 einops==0.8.2 beartype==0.22.4
tqdm==4.67.1` put them. Its own forward runs, of which four things are changed to those of the paper's section 2.1:

- the answer to a patch is told to the places that write it, the first included. 0.3.6 moves it on by one place: the
  first byte of a patch is then written by the patch before, which its last place has read, under that one's answer;
- a patch is embedded as its bytes side by side, without a map and two norms after it;
- each place of a patch is told its own part of the answer, by a map that all share;
- layers do not shift half of their channels by one place.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

MODELS = {  # widths, depths and lengths from the last level to that of bytes
    "two": {"num_tokens": 19, "dim": (16, 8), "depth": (2, 1), "max_seq_len": (5, 4)},
    "three": {"num_tokens": 19, "dim": (24, 12, 8), "depth": (1, 1, 2), "max_seq_len": (3, 2, 3)},
}
HEAD = 4


class Paper:
    """torch.nn.functional for the module of the package, whose padding by one place goes to the other end."""

    def __getattr__(self, name):
        return getattr(F, name)

    @staticmethod
    def pad(x, widths, **options):
        return F.pad(x, (0, 0, 0, 1) if widths == (0, 0, 1, 0) else widths, **options)


class Listener(nn.Module):
    """In place of the head: it keeps what the head would be told."""

    def forward(self, told):
        self.told = told
        return told


def by_the_paper(fields: dict) -> tuple[nn.Module, list[torch.Tensor]]:
    """A model, and the maps of parts of answers, the last level first."""
    import MEGABYTE_pytorch.megabyte as package

    package.token_shift, package.F = (lambda x: x), Paper()
    model = package.MEGABYTE(**fields, dim_head=HEAD, rel_pos=True)
    sizes, lengths, maps, patch = fields["dim"], fields["max_seq_len"], [], 1
    for stage, (size, depth) in enumerate(zip(sizes, fields["depth"], strict=True)):
        heads = {"dim_head": HEAD, "heads": size // HEAD}
        model.transformers[stage] = package.Transformer(dim=size, layers=depth, **heads)
    for level, (size, length) in enumerate(zip(sizes[-2::-1], lengths[:0:-1], strict=True), 1):
        patch *= length
        side_by_side = model.token_embs[level][1]
        model.token_embs[level] = nn.Sequential(nn.Embedding(fields["num_tokens"], size // patch), side_by_side)
    for stage, length in enumerate(lengths[1:]):
        shared = 0.5 * torch.randn(sizes[stage + 1], sizes[stage] // length)
        projection = model.to_next_transformer_projections[stage][1]
        projection.weight.data = torch.block_diag(*[shared] * length)
        projection.bias.data.zero_()
        maps.append(shared)
    return model.eval(), maps


@torch.no_grad()
def answers(fields: dict) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model, maps = by_the_paper(fields)
    for name, parameter in model.named_parameters():  # at which attention is far from uniform
        if "projections" not in name:
            noise = torch.randn(parameter.shape)
            parameter.data = 1 + 0.3 * noise if name.endswith(".g") else 0.5 * noise
    weights = {f"weights.{name}": x.clone() for name, x in model.state_dict().items() if "projections" not in name}
    weights = {name: x for name, x in weights.items() if not name.startswith("weights.to_logits")}
    weights |= {f"weights.maps.{stage}": x for stage, x in enumerate(maps)}
    ids = torch.randint(fields["num_tokens"], (2, torch.tensor(fields["max_seq_len"]).prod()))
    model.to_logits = Listener()
    model.double()(ids)
    return weights | {"ids": ids, "answers": model.to_logits.told[..., :-1, :].reshape(2, ids.shape[1], -1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="the folder that the packages are in")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("megabyte_lucidrains.safetensors"))
    options = parser.parse_args()
    sys.path.insert(0, options.peer)
    golden = {name: answers(fields) for name, fields in MODELS.items()}
    tensors = {f"{model}.{key}": x.contiguous().clone() for model, found in golden.items() for key, x in found.items()}
    save_file(tensors, options.output, {"configs": json.dumps(MODELS)})
    print(f"{options.output}: {options.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
