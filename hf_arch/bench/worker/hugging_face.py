"""Models that are called as those of transformers are: ours, and transformers' own."""

import importlib

import torch

from .machine import now
from .subject import ANSWER, Subject


class HuggingFace(Subject):
    """A model with a language-modelling head."""

    def __init__(self, shape: dict, longest: int, **options):
        self.transformers = importlib.import_module("transformers")
        self.transformers.logging.set_verbosity_error()
        self.model = self.build(shape | {"max_position_embeddings": longest}, **options)

    def build(self, sizes: dict, **options) -> torch.nn.Module:
        raise NotImplementedError

    def logits(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits

    def loss(self, ids):
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss

    def begin(self, ids, room):
        return self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    def step(self, token, memory):
        return self.model(input_ids=token, past_key_values=memory, use_cache=True).past_key_values

    def generate(self, ids, new_tokens, **options):
        moments = []

        def clock(input_ids, scores, **kwargs):
            moments.append(now(input_ids.device))
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        self.model.generation_config.eos_token_id = None  # it would end early
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens + 1,
            do_sample=False,
            stopping_criteria=self.transformers.StoppingCriteriaList([clock]),
            **options,
        )
        return (moments[-1] - moments[0]) / new_tokens


class Ours(HuggingFace):
    """A row of the catalogue, whose config is told `fields` beside sizes."""

    def build(self, sizes, row, head, fields=None, **options):
        architecture = importlib.import_module("hf_arch").find(row)
        fields = sizes | architecture.head_fields.get(head, {}) | (fields or {})
        return architecture.load(head)(architecture.load("Config")(**fields))


class AsLarge(Ours):
    """A row with as many layers as bring it nearest to the parameters of the row `like`."""

    def build(self, sizes, row, head, like, **options):
        def parameters(row: str, **fields) -> int:
            with torch.device("meta"):
                return Ours.build(self, sizes | fields, row, head).num_parameters()

        one, two = (parameters(row, num_hidden_layers=layers) for layers in (1, 2))
        layers = 1 + round((parameters(like) - one) / (two - one))
        return super().build(sizes | {"num_hidden_layers": max(1, layers)}, row, head)


class Transformers(HuggingFace):
    """A class of transformers: `config` and `model` are their names, `fields` what its config is told beside sizes,
    `padding_rows` how many rows of its table of positions no token takes."""

    def build(self, sizes, config, model, fields=None, padding_rows=0, **options):
        sizes = {"num_key_value_heads": sizes["num_attention_heads"]} | sizes  # Mixtral's default is 8, whatever
        sizes["max_position_embeddings"] += padding_rows
        made = getattr(self.transformers, config)(**(sizes | (fields or {})))
        return getattr(self.transformers, model)(made)


class StaticTransformers(Transformers):
    """The same with a cache of fixed size."""

    def begin(self, ids, room):
        memory = self.transformers.StaticCache(config=self.model.config, max_cache_len=ids.shape[1] + room)
        self.model(input_ids=ids, past_key_values=memory, use_cache=True, logits_to_keep=1)
        return memory

    def generate(self, ids, new_tokens, **options):
        return super().generate(ids, new_tokens, cache_implementation="static", **options)


class Mamba(Transformers):
    """Its cache has a name of its own, and what is called `intermediate_size` is another size."""

    def build(self, sizes, **options):
        return super().build({name: size for name, size in sizes.items() if name != "intermediate_size"}, **options)

    def begin(self, ids, room):
        return self.model(input_ids=ids, use_cache=True).cache_params

    def step(self, token, memory):
        return self.model(input_ids=token, cache_params=memory, use_cache=True).cache_params


class Mamba2(Mamba):
    """Its heads are together twice as wide as the model."""

    def build(self, sizes, **options):
        heads = sizes["num_attention_heads"]
        return super().build(sizes | {"num_heads": heads, "head_dim": 2 * sizes["hidden_size"] // heads}, **options)


class Rwkv4(Transformers):
    """Its memory has a name of its own."""

    def begin(self, ids, room):
        return self.model(input_ids=ids, use_cache=True).state

    def step(self, token, memory):
        return self.model(input_ids=token, state=memory, use_cache=True).state


class GPTNeo(Transformers):
    """Layers that see all and layers with windows in turn. Each keeps a mask of all pairs: as few as passes need."""

    def build(self, sizes, **options):
        pairs = [[["global", "local"], sizes["num_hidden_layers"] // 2]]
        sizes = sizes | {"max_position_embeddings": min(sizes["max_position_embeddings"], 8192)}
        return super().build(sizes, fields={"attention_types": pairs, "window_size": 256}, **options)


class Reformer(Transformers):
    """Its layers are named one by one, two sizes and its cache have names of their own."""

    def build(self, sizes, fields, **options):
        layers = [("local", "lsh")[layer % 2] for layer in range(sizes["num_hidden_layers"])]
        own = {"attn_layers": layers, "feed_forward_size": sizes["intermediate_size"], "is_decoder": True}
        own["attention_head_size"] = sizes["hidden_size"] // sizes["num_attention_heads"]
        sizes = {name: size for name, size in sizes.items() if name not in ("num_hidden_layers", "intermediate_size")}
        names = {"config": "ReformerConfig", "model": "ReformerModelWithLMHead"}
        return super().build(sizes, fields=fields | own, **names)

    def begin(self, ids, room):
        return self.model(input_ids=ids, use_cache=True).past_buckets_states

    def step(self, token, memory):
        return self.model(input_ids=token, past_buckets_states=memory, use_cache=True).past_buckets_states


class Encoder(HuggingFace):
    """A model without a head, which learns to answer with zeros."""

    def logits(self, ids):
        return self.model(input_ids=ids).last_hidden_state

    def loss(self, ids):
        return self.logits(ids).square().mean()


class OurEncoder(Encoder, Ours):
    pass


class Reader(HuggingFace):
    """A model that reads a source and answers: a context is a source, after which it writes."""

    def logits(self, ids):
        return self.model(input_ids=ids, decoder_input_ids=ids[:, :ANSWER], use_cache=False).logits

    def loss(self, ids):
        return self.model(input_ids=ids, labels=ids[:, :ANSWER], use_cache=False).loss

    def begin(self, ids, room):
        told = {"encoder_outputs": self.model.get_encoder()(ids), "past_key_values": None}
        return self.step(ids[:, :1], told)

    def step(self, token, memory):
        outputs = self.model(decoder_input_ids=token, use_cache=True, **memory)
        return memory | {"past_key_values": outputs.past_key_values}


class OurReader(Reader, Ours):
    pass


class LED(Reader, Transformers):
    """Its config has names of its own for sizes."""

    def build(self, sizes, **options):
        names = {
            "hidden_size": "d_model",
            "num_hidden_layers": "{}_layers",
            "num_attention_heads": "{}_attention_heads",
        }
        names |= {"intermediate_size": "{}_ffn_dim", "max_position_embeddings": "max_{}_position_embeddings"}
        fields = {name.format(of): sizes[ours] for ours, name in names.items() for of in ("encoder", "decoder")}
        fields |= {"vocab_size": sizes["vocab_size"], "dropout": 0.0}
        made = self.transformers.LEDConfig(**fields)
        return self.transformers.LEDForConditionalGeneration(made)


class DeepSeek(Transformers):
    """With the sizes that ours has by default for such a shape."""

    def build(self, sizes, **options):
        ours = importlib.import_module("hf_arch").find("deepseek").load("Config")(**sizes)
        same = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        same += ("num_experts_per_tok", "n_shared_experts", "moe_intermediate_size", "first_k_dense_replace")
        fields = {name: getattr(ours, name) for name in (*same, "n_group", "topk_group")}
        return super().build(sizes, fields=fields | {"n_routed_experts": ours.num_local_experts}, **options)


class T5Encoder(Encoder, Transformers):
    """Its config has names of its own for two sizes."""

    def build(self, sizes, **options):
        head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
        return super().build(sizes | {"d_ff": sizes["intermediate_size"], "d_kv": head_dim}, **options)
