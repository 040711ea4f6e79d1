"""Checkpoints of BigBird (google/bigbird-roberta-base).

Not of its ForQuestionAnswering and ForSequenceClassification, whose heads are others. The random blocks of an original
are drawn by numpy in training, and all the first block in evaluation: ours are those of our hash.
"""

from transformers import BigBirdConfig

from ...dense.transformer.conversion_transformer import BERT, bert_config
from ...hierarchical.hat.conversion_hat import OF_TRANSFORMER, refuse
from ...skeleton.conversion import Conversion, Fields, Rule, require

ACTIVATIONS = {"gelu_new": "gelu_pytorch_tanh"}  # the same in one pass


def bigbird_config(fields: Fields) -> Fields:
    require(fields, attention_type="block_sparse", use_bias=True, rescale_embeddings=False)
    shared = {name: value for name, value in bert_config(fields, BigBirdConfig).items() if name not in OF_TRANSFORMER}
    original = BigBirdConfig.from_dict(fields)
    return shared | {
        "hidden_act": ACTIVATIONS.get(original.hidden_act, original.hidden_act),
        "block_size": original.block_size,
        "num_random_blocks": original.num_random_blocks,
    }


BIGBIRD = Conversion(
    model_type="big_bird",
    config=bigbird_config,
    heads={
        "BigBirdForPreTraining": "ForMaskedLM",
        "BigBirdForMaskedLM": "ForMaskedLM",
        "BigBirdModel": "Model",
        "BigBirdForTokenClassification": "ForTokenClassification",
        "BigBirdForMultipleChoice": "ForMultipleChoice",
    },
    default_head="ForMaskedLM",
    original=refuse("the original looks at other random blocks."),
    rules=(Rule(r"(?:bert\.)?pooler\.(\w+)", r"pooler.dense.\1"), *BERT.rules),
)

CONVERSIONS = (BIGBIRD,)
