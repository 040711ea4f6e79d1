"""Checkpoints of Mamba-2: those of the authors' code (state-spaces/mamba2-130m) and those of transformers."""

import math

from transformers import Mamba2Config

from ...skeleton.conversion import Fields, require
from ..conversion_selective import authors_fields, conversions, transformers_fields


def transformers_config(fields: Fields) -> Fields:
    config = Mamba2Config.from_dict({name: value for name, value in fields.items() if name != "time_step_limit"})
    return transformers_fields(fields, config) | {
        "num_attention_heads": config.num_heads,
        "n_groups": config.n_groups,
        "time_step_limit": step_limit(fields.get("time_step_limit")),
    }


def authors_config(fields: Fields) -> Fields:
    layer = {"headdim": 64, "ngroups": 1} | fields["ssm_cfg"]
    require(layer, layer="Mamba2", norm_before_gate=False, rmsnorm=True, D_has_hdim=False, d_ssm=None)
    found = authors_fields(fields, state_size=128, multiple=16)
    return found | {
        "num_attention_heads": found["expand"] * found["hidden_size"] // layer["headdim"],
        "n_groups": layer["ngroups"],
        "time_step_limit": step_limit(layer.get("dt_limit")),
    }


def step_limit(limit: list | None) -> list[float] | None:
    """None for 0 to infinity, which transformers writes as {"__float__": "Infinity"}."""
    if limit is None or limit[0] == 0 and limit[1] in (math.inf, {"__float__": "Infinity"}):
        return None
    return [float(number) for number in limit]


CONVERSIONS = conversions("Mamba2", transformers_config, authors_config)
