"""Write hat_original.safetensors: the weights of a small HAT of the paper's authors, and what it answers in float64.

    python tests/goldens/make_hat_original.py --peer CHECKOUT_OF_HIERARCHICAL_TRANSFORMERS

The checkout is of github.com/coastalcph/hierarchical-transformers. Its code is of an older transformers: what that gave
and the installed one does not is put back here.
"""

import argparse
import importlib.util
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

FIELDS = {
    "model_type": "hierarchical-transformer",
    "architectures": ["HATModel"],
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "max_sentences": 5,
    "max_sentence_length": 6,
    "model_max_length": 30,
    "max_position_embeddings": 8,
    "pad_token_id": 1,
    "type_vocab_size": 1,
    "encoder_layout": {
        "0": {"sentence_encoder": True, "document_encoder": False},
        "1": {"sentence_encoder": True, "document_encoder": True},
        "2": {"sentence_encoder": True, "document_encoder": True},
    },
}


def module_of(checkout: Path):
    path = checkout / "models" / "hat" / "modelling_hat.py"
    spec = importlib.util.spec_from_file_location("modelling_hat", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(module) -> torch.nn.Module:
    config = module.HATConfig(**{name: value for name, value in FIELDS.items() if name != "model_type"})
    config.is_decoder, config.chunk_size_feed_forward, config._attn_implementation = False, 0, "eager"
    module.HATModel.get_extended_attention_mask = lambda self, mask, *shape: (
        (1.0 - mask[:, None, None].double()) * -1e9  # the code looks for masked leaders by their size
    )
    module.HATModel.use_return_dict = True
    model = module.HATModel(config).double().eval()
    tables = [layer.position_embeddings for layer in model.encoder.layer if layer.use_document_encoder]
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        parameter.data = (1 + 0.2 * noise if parameter.ndim == 1 else 0.5 * noise).double()
    for table in tables:
        table.weight.data = tables[0].weight.data  # tied, as its `_tie_weights` does
    return model


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, required=True, help="checkout of hierarchical-transformers")
    model = build(module_of(parser.parse_args().peer))
    ids = torch.randint(2, 23, (2, 30), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 4:6] = mask[0, 15:18] = mask[1, 23:] = 0  # within segments, and a whole one
    ids = ids.masked_fill(mask == 0, 1)
    answer = model(input_ids=ids, attention_mask=mask, return_dict=True)[0]
    tensors = {f"hi_transformer.{name}": tensor.float() for name, tensor in model.state_dict().items()}
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    told = {"ids": ids, "mask": mask, "answer": answer.contiguous()}
    save_file(tensors | told, Path(__file__).with_name("hat_original.safetensors"), {"config": json.dumps(FIELDS)})


if __name__ == "__main__":
    main()
