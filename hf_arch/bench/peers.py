"""Who else does the same job: a peer is an entry here and a subject in `worker/`."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field

from hf_arch.architecture import Architecture

FORWARD = ("forward", "training")
DECODE = ("step", "generate")


@dataclass(frozen=True)
class Environment:
    """A virtual environment, made when a peer is first asked for."""

    name: str
    packages: tuple[str, ...] = ()
    unaided: tuple[str, ...] = ()  # packages installed without what they ask for: it is not needed, or it is CUDA


@dataclass(frozen=True)
class Peer:
    name: str
    row: str  # of the catalogue, whose job it does
    subject: str  # module:class in worker/
    options: dict = field(default_factory=dict)  # what the subject is told beside the shape
    measures: tuple[str, ...] = FORWARD + DECODE
    environment: Environment | None = None  # None: ours


MAMBA = {"config": "MambaConfig", "model": "MambaForCausalLM"}
MAMBA2 = {"config": "Mamba2Config", "model": "Mamba2ForCausalLM", "fields": {"n_groups": 1}}
RWKV4 = {"config": "RwkvConfig", "model": "RwkvForCausalLM"}
LLAMA = {"config": "LlamaConfig", "model": "LlamaForCausalLM"}
MIXTRAL = {"config": "MixtralConfig", "model": "MixtralForCausalLM"}
# Without dropout, as ours; with as many buckets as ours
REFORMER = {"axial_pos_embds": False, "num_buckets": 64}
REFORMER |= {"hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0}
# Its default, and the loop over experts; its batched products copy the weights of an expert for each token that takes
# it, which is bearable for few tokens
EXPERTS = {name: {"fields": {"experts_implementation": name}} for name in ("grouped_mm", "eager", "batched_mm")}
DEEPSEEK = {"config": "DeepseekV3Config", "model": "DeepseekV3ForCausalLM"}
LONGFORMER = {"config": "LongformerConfig", "model": "LongformerForMaskedLM", "padding_rows": 2}
GPT_NEO = {"config": "GPTNeoConfig", "model": "GPTNeoForCausalLM"}
BIGBIRD = {"config": "BigBirdConfig", "model": "BigBirdForMaskedLM"}
T5 = {"config": "T5Config", "model": "T5EncoderModel", "fields": {"feed_forward_proj": "gated-gelu"}}
# Every other layer sparse, as in ours; without dropout, and with room for all
SWITCH = {"num_sparse_encoder_layers": 2, "dropout_rate": 0.0, "expert_capacity": 2**20}
SWITCH = {"config": "SwitchTransformersConfig", "model": "SwitchTransformersEncoderModel", "fields": SWITCH}

PEERS = (
    Peer("llama", "transformer", "hugging_face:Transformers", LLAMA),
    Peer("llama_static", "transformer", "hugging_face:StaticTransformers", LLAMA, measures=DECODE),
    Peer("reformer_transformers", "reformer", "hugging_face:Reformer", {"fields": REFORMER}),
    Peer("mixtral_grouped_mm", "mixtral", "hugging_face:Transformers", MIXTRAL | EXPERTS["grouped_mm"]),
    Peer("mixtral_eager", "mixtral", "hugging_face:Transformers", MIXTRAL | EXPERTS["eager"]),
    Peer(
        "mixtral_batched_mm",
        "mixtral",
        "hugging_face:Transformers",
        MIXTRAL | EXPERTS["batched_mm"],
        measures=DECODE,
    ),
    Peer(
        "dense_active",  # ours, whose feed-forwards are as large as the two experts that a token takes
        "mixtral",
        "hugging_face:Ours",
        {"row": "transformer", "head": "ForCausalLM", "fields": {"intermediate_size": 2048}},
    ),
    Peer("deepseek_v3", "deepseek", "hugging_face:DeepSeek", DEEPSEEK),
    Peer(
        "dense_transformer",  # ours, of the same sizes
        "mixture_of_depths",
        "hugging_face:Ours",
        {"row": "transformer", "head": "ForCausalLM"},
    ),
    Peer(
        "compressive",
        "compressive_transformer",
        "compressive:Compressive",
        measures=FORWARD,
        environment=Environment(
            "compressive",
            packages=("einops",),
            unaided=("compressive-transformer-pytorch==0.4.0", "mogrifier==0.0.5"),
        ),
    ),
    Peer(
        "hourglass_package",
        "hourglass",
        "lucidrains:Hourglass",
        {"shorten_factor": 4},
        measures=FORWARD,
        environment=Environment(
            "hourglass_package",
            unaided=("hourglass-transformer-pytorch==0.0.6", "einops==0.8.2"),
        ),
    ),
    Peer(
        "megabyte_package",
        "megabyte",
        "lucidrains:MegaByte",
        {"patch_size": 8},
        measures=FORWARD,
        environment=Environment(
            "megabyte_package",
            unaided=("MEGABYTE-pytorch==0.3.6", "einops==0.8.2", "beartype==0.22.4", "packaging==25.0", "tqdm==4.67.1"),
        ),
    ),
    Peer(
        "flat_transformer",  # ours, of as many parameters
        "megabyte",
        "hugging_face:AsLarge",
        {"row": "transformer", "head": "ForCausalLM", "like": "megabyte"},
    ),
    Peer("led", "hat_encoder_decoder", "hugging_face:LED"),
    Peer(
        "encoder_decoder",  # ours, of the same sizes
        "hat_encoder_decoder",
        "hugging_face:OurReader",
        {"row": "encoder_decoder", "head": "ForConditionalGeneration"},
    ),
    Peer("longformer", "hat", "hugging_face:Transformers", LONGFORMER, measures=FORWARD),
    Peer("longformer_chunks", "longformer", "hugging_face:Transformers", LONGFORMER, measures=FORWARD),
    Peer("gpt_neo", "sparse_transformer", "hugging_face:GPTNeo", GPT_NEO, measures=FORWARD),  # no cache of its windows
    Peer("big_bird", "bigbird", "hugging_face:Transformers", BIGBIRD, measures=FORWARD),
    Peer("t5_encoder", "encoder_decoder", "hugging_face:T5Encoder", T5, measures=FORWARD),
    Peer("switch_encoder", "switch", "hugging_face:T5Encoder", SWITCH, measures=FORWARD),
    Peer("mamba", "s6", "hugging_face:Mamba", MAMBA, measures=("forward", *DECODE)),  # its backward is quadratic
    Peer(
        "mambapy",
        "s6",
        "mambapy:Mamba",
        measures=(*FORWARD, "step"),
        environment=Environment("mambapy", unaided=("mambapy==1.2.0",)),
    ),
    Peer("mamba2", "ssd", "hugging_face:Mamba2", MAMBA2),
    Peer(
        "performer_pytorch",
        "performer",
        "performer_pytorch:Performer",
        {"num_features": 256},  # as many as ours has for heads of 64
        measures=FORWARD,
        environment=Environment(
            "performer_pytorch",
            unaided=(
                "einops==0.8.2",
                "performer-pytorch==1.1.4",
                "axial-positional-embedding==0.3.12",
                "local-attention==1.11.2",
                "hyper-connections==0.4.11",
                "setuptools==80.9.0",  # distutils, which Python 3.12 is without
            ),
        ),
    ),
    Peer("rwkv", "rwkv4", "hugging_face:Rwkv4", RWKV4),
    Peer(
        "rwkv_package",
        "rwkv7",
        "rwkv:RWKV7",
        measures=("forward", "step"),
        environment=Environment("rwkv", unaided=("rwkv==0.8.32",)),
    ),
    Peer(
        "torchscale",
        "retnet",
        "torchscale:RetNet",
        measures=(*FORWARD, "step"),
        environment=Environment("torchscale", unaided=("torchscale==0.3.0",)),
    ),
    Peer(
        "transfo_xl",
        "transformer_xl",
        "transfo_xl:TransfoXL",
        measures=(*FORWARD, "step"),
        environment=Environment(
            "transfo_xl",
            packages=(
                "huggingface_hub<1",
                "pyyaml",
                "regex",
                "requests",
                "tqdm",
                "packaging",
                "filelock",
                "safetensors",
            ),
            unaided=("transformers==4.36.2",),
        ),
    ),
    Peer(
        "routing_package",
        "routing_transformer",
        "lucidrains:RoutingTransformer",
        measures=FORWARD,
        environment=Environment(
            "routing_package",
            unaided=(
                "routing-transformer==1.6.1",
                "local-attention==1.4.3",
                "product-key-memory==0.1.10",
                "mixture-of-experts==0.2.3",
                "einops==0.8.2",
            ),
        ),
    ),
)


def chosen_peers(names: Iterable[str] | None, rows: Iterable[Architecture]) -> list[Peer]:
    """The peers of `rows` that are called `names`; all of them if there are no names, none for None."""
    if names is None:
        return []
    names, rows = list(names), {row.name for row in rows}
    known = {peer.name for peer in PEERS}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known)
            raise ValueError(f"No peer is called {name!r}. Did you mean {', '.join(near)}?")
        if not any(peer.row in rows for peer in PEERS if peer.name == name):
            jobs = ", ".join(sorted({peer.row for peer in PEERS if peer.name == name}))
            raise ValueError(f"{name} does the job of {jobs}, which is not among the rows to measure.")
    return [peer for peer in PEERS if peer.row in rows and (not names or peer.name in names)]
