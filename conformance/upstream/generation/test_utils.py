"""Not in the source distribution: what transformers asks of `generate()`, of every class that has it.

`tests/test_generate.py` holds generate() to the model's own forward in float64. Here its outputs, caches, strategies
and arguments agree with each other.
"""

from collections.abc import Iterator

import pytest
import torch
from torch.testing import assert_close
from transformers import Cache, CompileConfig, GenerationConfig, GenerationMixin, PreTrainedModel, StaticCache, set_seed

GREEDY = {"do_sample": False, "max_new_tokens": 5}
SCORED = GREEDY | {"output_scores": True, "return_dict_in_generate": True}


class GenerationTesterMixin:
    def generators(self) -> Iterator[tuple[PreTrainedModel, torch.Tensor]]:
        """Each class that generates, built, with a prompt [2, 7] without padding."""
        for model_class in self.all_generative_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            config.eos_token_id = None
            config.initializer_range = 0.2  # at the usual deviation faults hide below any tolerance
            set_seed(0)
            yield model_class(config).eval(), inputs["input_ids"][:2].clamp(min=3)

    def assert_same_scores(self, one, other):
        self.assertEqual(len(one.scores), len(other.scores))
        for scores, expected in zip(one.scores, other.scores, strict=True):
            assert_close(scores, expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.generate
    def test_inherits_generation_mixin(self):
        for model_class in self.all_generative_model_classes:
            assert issubclass(model_class, GenerationMixin)
            assert model_class.can_generate()
            assert model_class._supports_default_dynamic_cache()

    @pytest.mark.generate
    def test_greedy_generate(self):
        for model, prompt in self.generators():
            tokens = model.generate(prompt, **GREEDY)
            assert torch.equal(tokens[:, :7], prompt)
            assert tokens.shape == (2, 12)
            assert torch.equal(tokens, model.generate(prompt, generation_config=GenerationConfig(**GREEDY)))

    @pytest.mark.generate
    def test_greedy_generate_stops_at_eos(self):
        for model, prompt in self.generators():
            first = int(model.generate(prompt[:1], **GREEDY)[0, 7])
            tokens = model.generate(prompt[:1], **(GREEDY | {"eos_token_id": first, "pad_token_id": 0}))
            assert tokens.tolist() == [[*prompt[0].tolist(), first]]

    @pytest.mark.generate
    def test_greedy_generate_dict_outputs(self):
        wanted = {"output_hidden_states": True, "output_logits": True, "output_attentions": self.has_attentions}
        for use_cache in (False, True):
            for model, prompt in self.generators():
                model.set_attn_implementation("eager")
                output = model.generate(prompt, **SCORED, **wanted, use_cache=use_cache)
                layers = model.config.num_hidden_layers
                assert [len(output.scores), len(output.logits), len(output.hidden_states)] == [5, 5, 5]
                for step, states in enumerate(output.hidden_states):
                    length = 7 + step if not use_cache else 7 if step == 0 else 1
                    assert [x.shape for x in states] == [(2, length, model.config.hidden_size)] * (layers + 1)
                # A window's cache holds no more keys than its layer sees
                windows = [use_cache and kind == "sliding_attention" for kind in model.config.layer_types]
                for step, weights in enumerate(output.attentions or ()):
                    keys = [min(7 + step, model.config.sliding_window) if window else 7 + step for window in windows]
                    assert [x.shape[-1] for x in weights] == keys
                assert isinstance(output.past_key_values, Cache) == use_cache

    @pytest.mark.generate
    def test_sample_generate(self):
        for model, prompt in self.generators():
            several = model.generate(prompt, **(GREEDY | {"do_sample": True, "num_return_sequences": 3}))
            assert several.shape == (6, 12)
            set_seed(1)
            one = model.generate(prompt, **(GREEDY | {"do_sample": True, "top_p": 0.9, "temperature": 0.7}))
            set_seed(1)
            again = model.generate(
                prompt, **(GREEDY | {"do_sample": True, "top_p": 0.9, "temperature": 0.7, "use_cache": False})
            )
            assert torch.equal(one, again)

    @pytest.mark.generate
    def test_beam_search_generate(self):
        for model, prompt in self.generators():
            beams = SCORED | {"num_beams": 3, "num_return_sequences": 2}
            cached, plain = (model.generate(prompt, **beams, use_cache=use_cache) for use_cache in (True, False))
            assert cached.sequences.shape == cached.beam_indices.shape[:1] + (12,) == (4, 12)
            assert torch.equal(cached.sequences, plain.sequences)
            assert_close(cached.sequences_scores, plain.sequences_scores, atol=1e-4, rtol=1e-4)
            assert model.generate(prompt, **(GREEDY | {"num_beams": 2, "do_sample": True})).shape == (2, 12)

    @pytest.mark.generate
    def test_past_key_values_format(self):
        for model, prompt in self.generators():
            cache = model.generate(prompt, **SCORED).past_key_values
            assert len(cache) == model.config.num_hidden_layers
            assert int(cache.get_seq_length()) == 11  # the last token has not been read

    @pytest.mark.generate
    def test_generate_matches_without_cache_and_with_static_cache(self):
        for model, prompt in self.generators():
            expected = model.generate(prompt, **SCORED, use_cache=False)
            self.assert_same_scores(model.generate(prompt, **SCORED), expected)
            static = model.generate(prompt, **SCORED, cache_implementation="static")
            assert isinstance(static.past_key_values, StaticCache)
            self.assert_same_scores(static, expected)

    @pytest.mark.generate
    def test_eager_matches_sdpa_generate(self):
        for model, prompt in self.generators():
            expected = model.generate(prompt, **SCORED)
            model.set_attn_implementation("eager")
            self.assert_same_scores(model.generate(prompt, **SCORED), expected)

    @pytest.mark.generate
    def test_left_padding_compatibility(self):
        for model, prompt in self.generators():
            padded = torch.cat((torch.zeros_like(prompt[:, :4]), prompt), dim=1)
            mask = (padded != 0).long()
            expected = model.generate(prompt, **SCORED)
            self.assert_same_scores(model.generate(padded, attention_mask=mask, **SCORED), expected)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = model(padded, attention_mask=mask, position_ids=positions).logits
            assert_close(logits[:, 4:], model(prompt).logits, atol=1e-5, rtol=1e-4)

    @pytest.mark.generate
    def test_generate_from_inputs_embeds(self):
        for model, prompt in self.generators():
            embeds = model.get_input_embeddings()(prompt)
            for options in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
                expected = model.generate(prompt, **SCORED, **options)
                given = model.generate(prompt, inputs_embeds=embeds, **SCORED, **options)
                self.assert_same_scores(given, expected)
                assert torch.equal(given.sequences, expected.sequences)

    @pytest.mark.generate
    def test_generate_without_input_ids(self):
        for model, _ in self.generators():
            assert model.generate(**GREEDY).shape == (1, 6)  # from the bos token

    @pytest.mark.generate
    def test_generate_continue_from_past_key_values(self):
        for model, prompt in self.generators():
            whole = model.generate(prompt, **SCORED)
            part = model.generate(prompt, **(SCORED | {"max_new_tokens": 3}))
            rest = SCORED | {"max_new_tokens": 2, "past_key_values": part.past_key_values}
            going_on = model.generate(part.sequences, attention_mask=torch.ones_like(part.sequences), **rest)
            assert torch.equal(going_on.sequences, whole.sequences)
            assert_close(going_on.scores[-1], whole.scores[-1], atol=1e-4, rtol=1e-4)

    @pytest.mark.generate
    def test_chunked_prefill(self):
        for model, prompt in self.generators():
            self.assert_same_scores(
                model.generate(prompt, **SCORED, prefill_chunk_size=3), model.generate(prompt, **SCORED)
            )

    @pytest.mark.generate
    def test_prompt_lookup_decoding_matches_greedy_search(self):
        """The same tokens, or a model that says before the first one that its layers cannot go back."""
        for model, prompt in self.generators():
            prompt = prompt[:1].repeat(1, 2)
            lookup = GREEDY | {"max_new_tokens": 12}
            expected = model.generate(prompt, **lookup)
            try:
                getattr(model, "check_can_go_back", lambda: None)()
            except ValueError:
                with self.assertRaisesRegex(ValueError, "go back"):
                    model.generate(prompt, **lookup, prompt_lookup_num_tokens=2)
            else:
                assert torch.equal(model.generate(prompt, **lookup, prompt_lookup_num_tokens=2), expected)

    @pytest.mark.generate
    def test_forward_with_logits_to_keep(self):
        for model, prompt in self.generators():
            logits = model(prompt).logits
            assert_close(model(prompt, logits_to_keep=1).logits, logits[:, -1:], atol=1e-5, rtol=1e-5)
            kept = torch.tensor([0, 4])
            assert_close(model(prompt, logits_to_keep=kept).logits, logits[:, kept], atol=1e-5, rtol=1e-5)

    @pytest.mark.generate
    def test_generate_compile_model_forward_fullgraph(self):
        for model, prompt in self.generators():
            torch._dynamo.reset()
            static = SCORED | {"cache_implementation": "static"}
            compiled = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
            compiled._compile_all_devices = True
            expected = model.generate(prompt, **static, disable_compile=True)
            self.assert_same_scores(model.generate(prompt, **static, compile_config=compiled), expected)
            assert hasattr(model, "_compiled_call")
