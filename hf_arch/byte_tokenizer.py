"""Bytes as tokens, for models whose vocabulary they are."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

BOS, EOS = 254, 255  # bytes that UTF-8 never uses


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the bytes of a text in UTF-8, as H-Net reads it: 254 begins a text, 255 ends one and
    pads. Save it beside the model, and AutoTokenizer loads it. (ByT5's ids are the bytes plus 3.)"""
    special = {"<bos>": BOS, "<eos>": EOS}
    bytes_of = {sign: byte for byte, sign in bytes_to_unicode().items() if byte not in special.values()}
    tokenizer = Tokenizer(models.BPE(vocab=bytes_of | special, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>", padding_side="left"
    )
