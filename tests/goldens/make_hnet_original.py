"""Write hnet_original.safetensors: weights of a small H-Net of the authors' code, and what it answers in float64.

    python tests/goldens/make_hnet_original.py --peer CHECKOUT_OF_HNET

The sources of mamba-ssm, einops and optree have to be importable (`MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-deps
--no-build-isolation mamba-ssm einops optree`); what they and the authors' code ask of a GPU is written out here. The
original narrows to float32 in places, and its smoothing to bfloat16: here it must not. Weights are multiples of 1 / 64
below 2, so that a byte holds each.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

STAGES = {
    "arch_layout": ["m1", ["m1t1", ["T1"], "t1"], "m1"],
    "d_model": [32, 32, 64],
    "d_intermediate": [0, 0, 96],
    "vocab_size": 24,
}
RECURRENCE = {"d_conv": 3, "expand": 2, "d_state": 4, "chunk_size": 16}
ATTENTION = {"num_heads": [2, 2, 2], "rotary_emb_dim": [8, 8, 16], "window_size": [3, 3, -1]}
TARGETS = (2.0, 3.0)
CODED = 64


class Norm(nn.Module):
    """flash-attn's: with `residual`, of the sum; with `prenorm`, the sum too."""

    def __init__(self, size, eps=1e-5, device=None, dtype=None):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size, device=device, dtype=dtype)), eps

    def forward(self, x, residual=None, prenorm=False, residual_in_fp32=False):
        if residual is not None:
            x = x + residual
        if residual_in_fp32 and x.dtype != torch.float64:
            x = x.to(torch.float32)
        normed = F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps).to(self.weight.dtype)
        return (normed, x) if prenorm else normed


class GatedNorm(nn.Module):
    def __init__(self, size, eps=1e-5, norm_before_gate=True, group_size=None, device=None, dtype=None):
        super().__init__()
        assert not norm_before_gate and group_size in (None, size)
        self.weight, self.eps = nn.Parameter(torch.ones(size, device=device, dtype=dtype)), eps

    def forward(self, x, z):
        return F.rms_norm(x * F.silu(z), x.shape[-1:], self.weight, self.eps)


def scan(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, seq_idx=None, dt_softplus=False, **options):
    """mamba-ssm's mamba_chunk_scan_combined, step by step."""
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    state, outputs = x.new_zeros(len(x), *x.shape[2:], B.shape[-1]), []
    for t in range(x.shape[1]):
        if seq_idx is not None and t and seq_idx[0, t] != seq_idx[0, t - 1]:
            state = torch.zeros_like(state)
        added = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = state * (dt[:, t] * A).exp()[..., None, None] + added
        outputs.append((state * C[:, t, :, None]).sum(-1) + (0 if D is None else D[:, None] * x[:, t]))
    output = torch.stack(outputs, dim=1)
    return (output, state) if options.get("return_final_states") else output


def attend(module, query, key, value, seen=0):
    """[batch, length, heads, dim], causal, the last `window_size` keys beside itself; `seen` keys come before."""
    places = torch.arange(seen + query.shape[1])
    shown = places <= places[seen:, None]
    if module.window_size >= 0:
        shown = shown & (places >= places[seen:, None] - module.window_size)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=shown).transpose(1, 2)


def module_of(name: str, **contents) -> None:
    sys.modules[name] = module = ModuleType(name)
    vars(module).update(contents)


def import_hnet(checkout: str) -> None:
    """Make the authors' package importable, and able to run on a CPU."""
    sys.path.insert(0, checkout)
    sources = importlib.util.find_spec("mamba_ssm").submodule_search_locations
    module_of("mamba_ssm", __path__=sources)
    module_of("mamba_ssm.ops.triton.layernorm_gated", RMSNorm=GatedNorm)
    parts = dict.fromkeys(("mamba_split_conv1d_scan_combined", "mamba_conv1d_scan_ref"))
    module_of("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=scan, **parts)
    sys.modules["mamba_ssm.ops.triton.selective_state_update"] = None
    kernels = ("kvpacked", "qkvpacked", "varlen_kvpacked", "varlen_qkvpacked")
    module_of("flash_attn", __path__=[], **{f"flash_attn_{name}_func": ... for name in kernels})
    sys.modules["flash_attn"].flash_attn_with_kvcache = None
    for name in ("ops", "ops.triton", "utils"):
        module_of(f"flash_attn.{name}", __path__=[])
    module_of("flash_attn.ops.triton.layer_norm", RMSNorm=Norm)
    module_of("flash_attn.ops.triton.rotary", apply_rotary=None)
    module_of("flash_attn.ops.activations", swiglu=lambda gate, y: F.silu(gate) * y)
    module_of("flash_attn.utils.generation", GenerationMixin=object)
    from hnet.modules.mha import CausalMHA

    CausalMHA.forward = attention


def attention(self, x, inference_params=None, **packed):
    """CausalMHA with a cache, without flash-attn's kernels: its own torch reference of a rotation."""
    from hnet.modules.rotary import apply_rotary_emb_torch

    query, key, value = self.Wqkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
    seen = 0 if inference_params is None else inference_params.seqlen_offset
    angles = torch.arange(seen, seen + x.shape[1])[:, None] * self.rotary_emb.inv_freq.to(x.dtype)
    query, key = (apply_rotary_emb_torch(each, angles.cos(), angles.sin()) for each in (query, key))
    if inference_params is not None:
        held = inference_params.key_value_memory_dict[self.layer_idx]
        held[:, seen : seen + x.shape[1]] = torch.stack((key, value), dim=2)
        key, value = held[:, : seen + x.shape[1]].unbind(2)
    return self.out_proj(attend(self, query, key, value, seen).flatten(2))


def build(fields: dict, dtype: torch.dtype) -> nn.Module:
    from hnet.models.config_hnet import AttnConfig, HNetConfig, SSMConfig
    from hnet.models.mixer_seq import HNetForCausalLM

    told = {
        name: AttnConfig(**part) if name == "attn_cfg" else SSMConfig(**part)
        for name, part in fields.items()
        if name in ("attn_cfg", "ssm_cfg")
    }
    model = HNetForCausalLM(HNetConfig(**(fields | told))).to(dtype).eval()
    for module in model.modules():
        if type(module).__name__ == "DeChunkLayer":
            module.dtype = dtype
        if hasattr(module, "use_mem_eff_path"):
            module.use_mem_eff_path = False
    return model


def coded(model: nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Weights far from small, as multiples of 1 / CODED."""
    codes = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.ndim == 1 else 0.25)
        begins = parameter.detach().float() if parameter.ndim == 1 or "routing_module" in name else 0.0
        codes[name] = ((noise + begins) * CODED).round().clamp(-127, 127).to(torch.int8)
        parameter.data = codes[name].to(parameter.dtype) / CODED
    return codes


def answers(model: nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    from hnet.utils.train import load_balancing_loss

    ids = torch.randint(STAGES["vocab_size"], (2, 24), generator=generator)
    one, real = ids[:1], torch.ones(1, ids.shape[1], dtype=torch.bool)
    whole = model(one, mask=real)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[24], [17]])
    both = model(ids, mask=mask)
    losses = [load_balancing_loss(told, ratio) for told, ratio in zip(whole.bpred_output, TARGETS, strict=True)]
    names = "backbone.main_network.routing_module.k_proj_layer.weight", "backbone.residual_proj.bias"
    names += ("backbone.main_network.main_network.pad_dimension",)
    loss = whole.logits.square().mean() + sum(losses)
    wanted = [model.get_parameter(name) for name in names]
    gradients = dict(zip(names, torch.autograd.grad(loss, wanted), strict=True))
    with torch.no_grad():
        cache = model.allocate_inference_cache(1, ids.shape[1], dtype=whole.logits.dtype)
        first = model(one[:, :9], mask=real[:, :9], inference_params=cache).logits
        steps = [first, *(model.step(one[:, t : t + 1], cache).logits for t in range(9, ids.shape[1]))]
    print(f"largest difference between steps and whole: {(torch.cat(steps, dim=1) - whole.logits).abs().max():.1e}")
    found = {"ids": ids, "mask": mask, "logits": both.logits.detach(), "ratio_loss": sum(losses).detach()}
    found |= {f"boundaries.{i}": told.boundary_prob[0, :, 1].detach() for i, told in enumerate(whole.bpred_output)}
    return found | {f"gradients.{name}": gradient.to(torch.float32) for name, gradient in gradients.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="a checkout of github.com/goombalab/hnet")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("hnet_original.safetensors"))
    options = parser.parse_args()
    import_hnet(options.peer)
    torch.Tensor.float = torch.Tensor.double
    generator = torch.Generator().manual_seed(0)
    model = build(STAGES | {"ssm_cfg": RECURRENCE, "attn_cfg": ATTENTION}, torch.float64)
    weights = {f"weights.{name}": code for name, code in coded(model, generator).items()}
    save_file({name: x.contiguous() for name, x in (weights | answers(model, generator)).items()}, options.output)
    print(f"{options.output}: {options.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
