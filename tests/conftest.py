"""Tiny random models, checkpoints and adapters that every test may ask for.

| fixture | gives |
|---|---|
| `tiny_bert` | `tiny_bert(task="text-classification", seed=0, **config)`: a BERT to evaluate |
| `tiny_model` | `tiny_model(kind, task="text-classification", seed=0, **config)`: any of KINDS |
| `tiny_checkpoint` | `tiny_checkpoint(kind="bert", task="text-classification")`: a directory that |
|  | holds such a model and a tokenizer; shared by the whole session: copy before changing |
| `tiny_tokenizer` | a WordPiece tokenizer with the 100 entries of the models' vocabulary |
| `random_adapter` | `random_adapter(model, seed=1, name="tuned", ...)`: never the identity |

KINDS are bert, roberta, distilbert, electra, deberta-v2, albert and mpnet; TASKS those of
`propulsion_export.base`. All have 32 channels, 2 layers, 4 heads, 100 tokens and 40 positions.
Biases and norms are random too: transformers starts them at zero and one, where a mistake with
them does not show.
"""

import numpy as np
import pytest

from propulsion_export.adapter import Adapter
from propulsion_export.scales import Scale

KINDS = ("bert", "roberta", "distilbert", "electra", "deberta-v2", "albert", "mpnet")
TASKS = (
    "text-classification",
    "token-classification",
    "question-answering",
    "fill-mask",
    "feature-extraction",
)
LABELS = ("no", "yes", "maybe")

_SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
}
_EXTRA = {
    "roberta": {"type_vocab_size": 1},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
    },
}
_CLASS_NAMES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "distilbert": "DistilBert",
    "electra": "Electra",
    "deberta-v2": "DebertaV2",
    "albert": "Albert",
    "mpnet": "MPNet",
}
_CLASS_ENDINGS = {
    "text-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "fill-mask": "ForMaskedLM",
    "feature-extraction": "Model",
}


def make_model(kind, task="text-classification", seed=0, **config):
    """A seeded random model in evaluation mode; heads of classifiers have the 3 LABELS."""
    import torch
    import transformers

    settings = _SIZES | _EXTRA.get(kind, {})
    if task in ("text-classification", "token-classification"):
        settings |= {
            "id2label": dict(enumerate(LABELS)),
            "label2id": {name: index for index, name in enumerate(LABELS)},
        }
    name = _CLASS_NAMES[kind]
    config_class = getattr(transformers, f"{name}Config")
    torch.manual_seed(seed)
    model = getattr(transformers, name + _CLASS_ENDINGS[task])(config_class(**settings | config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval().requires_grad_(False)


def make_random_adapter(
    model,
    seed=1,
    name="tuned",
    *,
    embeddings=True,
    biases=False,
    head=False,
    labels=None,
    task=None,
    only=None,
):
    """An adapter with a scale for every Linear (and Embedding) of the base model under the head.

    Args:
        model: what it is for; a model without a head is the base itself.
        seed: of the numbers. Scales are in [0.5, 1.5], one in eight of them negative.
        name: of the adapter.
        embeddings: scale the embeddings too.
        biases: train the biases of the scaled Linears too.
        head: save every parameter outside the base model whole.
        labels: class names.
        task: what the adapter says it is for.
        only: a text that a module path must contain.
    """
    from torch import nn

    chooser = np.random.default_rng(seed)
    kinds = (nn.Linear, nn.Embedding) if embeddings else nn.Linear
    base = [
        path
        for path, module in model.named_modules()
        if isinstance(module, kinds)
        and _in_base(model, path)
        and (only is None or only in path)
        # DeBERTa reads the weight of this one and never calls it: a scale there is refused.
        and not path.endswith("rel_embeddings")
    ]
    scales = {path: Scale(_random_scale(chooser, model.get_submodule(path))) for path in base}
    own = {
        path: model.get_submodule(path).bias
        for path in base
        if biases and getattr(model.get_submodule(path), "bias", None) is not None
    }
    return Adapter(
        name=name,
        scales=scales,
        biases={path: _near(chooser, bias) for path, bias in own.items()},
        modules={
            parameter: _near(chooser, value)
            for parameter, value in model.named_parameters(remove_duplicate=False)
            if head and not _in_base(model, parameter)
        },
        labels=labels,
        task=task,
    )


def _in_base(model, path):
    prefix = model.base_model_prefix
    return not hasattr(model, prefix) or path.startswith(f"{prefix}.")


def _random_scale(chooser, module):
    width = getattr(module, "out_features", None) or module.embedding_dim
    values = chooser.uniform(0.5, 1.5, width)
    values[chooser.permutation(width)[: width // 8]] *= -1
    return values


def _near(chooser, values):
    values = values.detach().double().numpy()
    return (values + chooser.normal(0, 0.2, values.shape)).astype(np.float32)


def save_tokenizer(directory):
    """Write a WordPiece tokenizer: 5 special tokens, 94 words, one ending."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [f"{first}{second}" for first in "bcdfghklmnprst" for second in ("a", "e", "i")]
    more = [f"{first}o{second}" for first in "bcdfghklmnprs" for second in "ltrn"]
    vocabulary = [*special, *words, *more, "##s"]
    tokenizer = Tokenizer(
        models.WordPiece({word: n for n, word in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=_SIZES["max_position_embeddings"],
    )
    fast.save_pretrained(directory)
    return fast


@pytest.fixture(scope="session")
def tiny_model():
    return make_model


@pytest.fixture(scope="session")
def tiny_bert():
    def make(task="text-classification", seed=0, **config):
        return make_model("bert", task, seed, **config)

    return make


@pytest.fixture(scope="session")
def random_adapter():
    return make_random_adapter


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    made = {}

    def make(kind="bert", task="text-classification"):
        if (kind, task) not in made:
            directory = tmp_path_factory.mktemp(f"{kind}-{task}")
            make_model(kind, task).save_pretrained(directory)
            save_tokenizer(directory)
            made[kind, task] = directory
        return made[kind, task]

    return make
