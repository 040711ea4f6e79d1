"""Checkpoints of Mamba: those of the authors' code (state-spaces/mamba-130m) and those of transformers (-hf)."""

from transformers import MambaConfig

from ...skeleton.conversion import Fields, Rule, require
from ..conversion_selective import RULES, authors_fields, conversions, transformers_fields


def transformers_config(fields: Fields) -> Fields:
    config = MambaConfig.from_dict(fields)
    return transformers_fields(fields, config) | {"time_step_rank": config.time_step_rank}


def authors_config(fields: Fields) -> Fields:
    layer = fields["ssm_cfg"]
    require(layer, layer="Mamba1")
    rank = layer.get("dt_rank", "auto")
    return authors_fields(fields, state_size=16, multiple=8) | {"time_step_rank": None if rank == "auto" else rank}


S6_RULES = (
    Rule(
        r"(?:backbone\.)?layers\.(\d+)\.mixer\.A_log",
        r"model.layers.\1.mixer.A_log",
        change=lambda A_log, config: A_log.T,  # the states of a channel come first in ours
    ),
    *RULES,
)

CONVERSIONS = conversions("Mamba", transformers_config, authors_config, S6_RULES)
