"""Tiny random models, checkpoints and adapters that every test may ask for.

| fixture | gives |
|---|---|
| `tiny_bert` | `tiny_bert(task="text-classification", seed=0, **config)`: a BERT to evaluate |
| `tiny_model` | `tiny_model(kind, task="text-classification", seed=0, **config)`: any of KINDS |
| `tiny_checkpoint` | `tiny_checkpoint(kind="bert", task="text-classification")`: a directory that |
|  | holds such a model and a tokenizer; shared by the whole run: copy before changing |
| `tiny_tokenizer` | a WordPiece tokenizer with the 100 entries of the models' vocabulary |
| `random_adapter` | `random_adapter(model, seed=1, name="tuned", ...)`: never the identity |

KINDS are bert, roberta, distilbert, electra, deberta-v2, albert and mpnet; TASKS those
of `propulsion_export.base_model.tasks`. `kinds.py` has the generative models, for parametrising;
their task is chosen by itself. All have 32 channels, 2 layers, 4 heads and 100 tokens; encoders
have 40 positions, generative models 160. Biases and norms are random too: transformers starts them
at zero and one, where a mistake with them does not show.
"""

from functools import cache

import numpy as np
import pytest

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale

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
_TOKENS = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
_GPT = _TOKENS | {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 37,
    "n_positions": 160,
    "initializer_range": 0.2,
}
_LLAMA = (
    _SIZES | _TOKENS | {"max_position_embeddings": 160, "num_key_value_heads": 2, "head_dim": 8}
)
# Configuration class, model class, settings; windows are short enough to hide something.
_GENERATIVE = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", _GPT | {"rotary_dim": 4}),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        _TOKENS | {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    ),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        _TOKENS
        | {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 37,
            "max_position_embeddings": 160,
            "init_std": 0.2,
        },
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "mistral": ("MistralConfig", "MistralForCausalLM", _LLAMA | {"sliding_window": 16}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _LLAMA),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        _LLAMA
        | {
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        },
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _LLAMA | {"original_max_position_embeddings": 160}),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 40},
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        _LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        _TOKENS
        | {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 37,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 20,
        },
    ),
    "bart": (
        "BartConfig",
        "BartForConditionalGeneration",
        _TOKENS
        | {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 37,
            "decoder_ffn_dim": 37,
            "max_position_embeddings": 160,
            "init_std": 0.2,
            "decoder_start_token_id": 3,
            "forced_eos_token_id": None,
        },
    ),
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
    torch = pytest.importorskip("torch", reason="a model is made")
    transformers = pytest.importorskip("transformers", reason="a model is made")
    config_class, model_class, settings = _classes_and_settings(kind, task)
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(
        getattr(transformers, config_class)(**settings | config)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval().requires_grad_(False)


def _classes_and_settings(kind, task):
    if kind in _GENERATIVE:
        return _GENERATIVE[kind]
    settings = _SIZES | _EXTRA.get(kind, {})
    if task in ("text-classification", "token-classification"):
        settings |= {
            "id2label": dict(enumerate(LABELS)),
            "label2id": {name: index for index, name in enumerate(LABELS)},
        }
    name = _CLASS_NAMES[kind]
    return f"{name}Config", name + _CLASS_ENDINGS[task], settings


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
    tied=False,
):
    """An adapter with a scale for every Linear (and Embedding) of the base model under the head.

    Experts that share a parameter have a scale each. A weight that is tied to another module's has
    none, unless asked for.

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
        tied: scale embeddings that are tied to another module's too.
    """
    from propulsion_export.scaling.expert_rules import expert_weights, scale_shape
    from propulsion_export.scaling.layer_rules import layer_kind

    chooser = np.random.default_rng(seed)
    kinds = ("linear", "conv1d", "embedding") if embeddings else ("linear", "conv1d")
    skipped = set() if tied else _tied_modules(model)
    base = [
        path
        for path, module in model.named_modules()
        if layer_kind(module) in kinds
        and path not in skipped
        and _in_base(model, path)
        and module is not model.get_output_embeddings()
        and (only is None or only in path)
        # Never called; DeBERTa's is read, so a scale there is refused.
        and not path.endswith(("rel_embeddings", "shared"))
    ]
    scales = {path: Scale(_random_scale(chooser, model.get_submodule(path))) for path in base}
    scales |= {
        f"{path}.{name}": Scale(chooser.uniform(0.5, 1.5, scale_shape(module, name)))
        for path, module in model.named_modules()
        for name in expert_weights(module)
        if only is None or only in f"{path}.{name}"
    }
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


def _tied_modules(model):
    owners = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(value), []).append(name.rpartition(".")[0])
    return {path for paths in owners.values() if len(paths) > 1 for path in paths}


def _random_scale(chooser, module):
    from propulsion_export.scaling.layer_rules import output_width

    width = output_width(module)
    values = chooser.uniform(0.5, 1.5, width)
    values[chooser.permutation(width)[: width // 8]] *= -1
    return values


def _near(chooser, values):
    values = values.detach().double().numpy()
    return (values + chooser.normal(0, 0.2, values.shape)).astype(np.float32)


def save_tokenizer(directory, *, generative=False):
    """Write a WordPiece tokenizer: 5 special tokens, 94 words, one ending.

    A generative one puts [CLS] before a text and nothing behind it, as Llama's does.
    """
    transformers = pytest.importorskip("transformers", reason="a tokenizer is made")
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
        single="[CLS] $A" if generative else "[CLS] $A [SEP]",
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
        model_max_length=160 if generative else _SIZES["max_position_embeddings"],
        **({"bos_token": "[CLS]", "eos_token": "[SEP]"} if generative else {}),
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
def tiny_checkpoint(shared):
    def make(kind="bert", task="text-classification"):
        def fill(directory):
            make_model(kind, task).save_pretrained(directory)
            save_tokenizer(directory, generative=kind in _GENERATIVE)

        return shared(f"checkpoint-{kind}-{task}", fill)

    return cache(make)
