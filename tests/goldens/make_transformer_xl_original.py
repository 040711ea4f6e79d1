"""Write transformer_xl_original.safetensors: weights of small models of transformers' TransfoXLLMHeadModel, and what
they answer in float64.

    python tests/goldens/make_transformer_xl_original.py --peer FOLDER

FOLDER is what `pip install --no-deps --target FOLDER transformers==4.36.2` makes: the last that has the
model and runs it. It asks for old versions of other packages, which the model does without. Without `mems` it would
begin with a memory of zeros that it looks at like any other; here, as in the authors' code, it begins with none.
The text is read in pieces, each of them a segment; kept is what it answers to the last token of each. It narrows to
float32 in masks and frequencies: here it must not.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file

SIZES = {
    "vocab_size": 40,
    "d_model": 16,
    "d_embed": 16,
    "n_head": 2,
    "d_head": 8,
    "d_inner": 12,
    "n_layer": 2,
    "mem_len": 12,
    "tgt_len": 8,
    "cutoffs": [],
    "div_val": 1,
    "clamp_len": -1,
    "same_length": False,
    "untie_r": True,
    "pre_lnorm": False,
    "tie_projs": [False],
    "tie_word_embeddings": True,
}
MODELS = {
    "segments": SIZES,
    "same_length": SIZES | {"same_length": True, "clamp_len": 9, "d_head": 5, "untie_r": False},
    "pre_norm": SIZES | {"pre_lnorm": True, "tie_word_embeddings": False},
    "adaptive": SIZES
    | {
        "n_layer": 1,
        "cutoffs": [10, 24],
        "div_val": 2,
        "tie_projs": [False, True, True],
        "same_length": True,
        "clamp_len": 10,
    },
    "adaptive_even": SIZES | {"n_layer": 1, "cutoffs": [10, 24], "d_embed": 12, "tie_projs": [True, True, True]},
    "projected": SIZES | {"n_layer": 1, "d_embed": 12, "tie_word_embeddings": False},
}


@torch.no_grad()
def answers(fields: dict, seed: int) -> dict[str, torch.Tensor]:
    peer = importlib.import_module("transformers.models.deprecated.transfo_xl")
    config = peer.configuration_transfo_xl.TransfoXLConfig(**fields)
    model = peer.modeling_transfo_xl.TransfoXLLMHeadModel(config).double().eval()
    exponent = torch.arange(0, fields["d_model"], 2, dtype=torch.float64) / fields["d_model"]
    model.transformer.pos_emb.inv_freq = 10000**-exponent
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_((1 + 0.2 * noise if parameter.ndim == 1 else 0.4 * noise).half())
    ids = torch.randint(fields["vocab_size"], (2, 52), generator=generator)
    memory = [torch.zeros(0, 2, fields["d_model"], dtype=torch.float64)] * fields["n_layer"]
    logits = []
    for piece in ids.split(fields["tgt_len"], dim=1):
        answer = model(piece, mems=memory)
        memory = answer.mems
        logits.append(answer.prediction_scores[:, -1:])
    loss = model(ids[:, : fields["tgt_len"]], mems=[x[:0] for x in memory], labels=ids[:, : fields["tgt_len"]]).loss
    state = {f"weights.{name}": tensor.half() for name, tensor in model.state_dict().items()}
    shared = {name for name, parameter in model.named_parameters(remove_duplicate=False)}
    shared -= {name for name, parameter in model.named_parameters()}
    state = {name: x for name, x in state.items() if name.removeprefix("weights.") not in shared}
    return state | {"ids": ids, "logits": torch.cat(logits, dim=1), "loss": loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="a folder with transformers 4.36.2")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("transformer_xl_original.safetensors"))
    options = parser.parse_args()
    sys.path.insert(0, options.peer)
    sys.modules["transformers.dependency_versions_check"] = MagicMock()
    torch.Tensor.float = lambda tensor: tensor
    golden = {name: answers(fields, seed) for seed, (name, fields) in enumerate(MODELS.items())}
    tensors = {f"{name}.{key}": x.contiguous() for name, model in golden.items() for key, x in model.items()}
    save_file(tensors, options.output, {"configs": json.dumps(MODELS)})
    print(f"{options.output}: {options.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
