"""What keeps experts equally busy: how busy the busiest and the idlest are after a short training, with each way to
balance them and without."""

import argparse
import json
import pydoc_data.topics
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import hf_arch
from benchmarks.experiments.record import RESULTS, write
from hf_arch.bench.results import rounded, this_machine
from hf_arch.bench.settings import Settings

NAME = "balance"
SHAPE = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"intermediate_size": 128, "num_local_experts": 8, "output_router_logits": True}
UNBALANCED = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
SWITCH = {"is_decoder": True, "is_encoder_decoder": False, "sparse_step": 1, "expert_capacity_factor": None}
DEEPSEEK = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "first_k_dense_replace": 0, "n_group": 1}
DEEPSEEK |= {"topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
DEEPSEEK |= {"v_head_dim": 16, "sequence_balance_coef": 0.0, "router_bias_update_rate": 0.0}
WAYS = {  # the row, and what its config is told
    "Switch: nothing": ("switch", SWITCH | UNBALANCED),
    "Switch: the balance loss (0.01)": ("switch", SWITCH | UNBALANCED | {"router_aux_loss_coef": 0.01}),
    "Mixtral: nothing": ("mixtral", UNBALANCED),
    "Mixtral: the balance loss (0.01)": ("mixtral", UNBALANCED | {"router_aux_loss_coef": 0.01}),
    "DeepSeek: nothing": ("deepseek", DEEPSEEK),
    "DeepSeek: a bias that follows the load (0.001)": ("deepseek", DEEPSEEK | {"router_bias_update_rate": 0.001}),
    "DeepSeek: the loss of a sequence (0.01)": ("deepseek", DEEPSEEK | {"sequence_balance_coef": 0.01}),
}
LENGTH, BATCH, HELD_OUT = 128, 8, 32


def texts() -> torch.Tensor:
    """[rows, length] bytes of Python's own documentation, which every Python carries."""
    whole = "\n".join(pydoc_data.topics.topics.values()).encode("ascii", "ignore")
    ids = torch.frombuffer(bytearray(whole), dtype=torch.uint8).long()
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def measure(row: str, fields: dict, steps: int) -> dict[str, float]:
    """The load of the busiest and of the idlest expert, over the mean, and nats a byte, on text held out."""
    rows, draw = texts(), torch.Generator().manual_seed(0)
    rows = rows[torch.randperm(len(rows), generator=draw)]
    learn, ask = rows[HELD_OUT:], rows[:HELD_OUT]
    found = hf_arch.find(row)
    torch.manual_seed(0)
    model = found.load("ForCausalLM")(found.load("Config")(**SHAPE | fields)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
    for _ in range(steps):
        batch = learn[torch.randint(len(learn), (BATCH,), generator=draw)]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
    with torch.no_grad():
        outputs = model.eval()(ask)
    load = hf_arch.routing_statistics(outputs).load
    loss = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ask[:, 1:].flatten())
    busy = load * load.shape[-1]
    return {"busiest": float(busy.max()), "idlest": float(busy.min()), "loss": float(loss)}


def section(found: dict | None) -> str:
    """Of the page of experiments."""
    parts = [
        "## Experts that are equally busy",
        "Small models learn to name the next byte of Python's documentation, with each way to keep experts equally "
        "busy and without. How busy the busiest and the idlest expert of any layer are, over the mean, and nats a "
        "byte, on text held out. [arXiv:2101.03961](https://arxiv.org/abs/2101.03961), "
        "[arXiv:2412.19437](https://arxiv.org/abs/2412.19437)",
    ]
    if found is None:
        return "\n\n".join([*parts, f"Not run yet: `python -m benchmarks.experiments.{NAME}`."])
    lines = ["| model: what balances it | busiest | idlest | loss |", "| --- | --: | --: | --: |"]
    for name, at in found["ways"].items():
        lines.append(f"| {name} | {at['busiest']:.2f} | {at['idlest']:.2f} | {at['loss']:.3f} |")
    machine = found["machine"]
    made = (
        f"{SHAPE['num_hidden_layers']} layers, width {SHAPE['hidden_size']}, {SHAPE['num_local_experts']} experts, of "
        f"which a token takes one (Switch) or two; {found['steps']} steps of {BATCH} texts of {LENGTH} bytes, AdamW "
        f"0.002, falling to 0; one seed; {machine['processor']}, torch {machine['torch']}, {machine['date']}."
    )
    return "\n\n".join([*parts, "\n".join(lines), made])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(f"python -m benchmarks.experiments.{NAME}", description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="default: %(default)s")
    options = parser.parse_args(arguments)
    found = {"steps": options.steps, "machine": this_machine(Settings()), "ways": {}}
    for name, (row, fields) in WAYS.items():
        found["ways"][name] = at = measure(row, fields, options.steps)
        print(f"{name:48}" + "  ".join(f"{what} {value:.2f}" for what, value in at.items()), flush=True)
    write(NAME, json.dumps(rounded(found)), options.output)


if __name__ == "__main__":
    main()
