"""Sentence encoders as sentence-transformers saves them: what is pooled, projected and normalised.

Without `modules.json` and its folders a merged all-MiniLM-L6-v2 gives vectors of length 12 instead
of 1, and one that pools the first token gives other vectors altogether.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from propulsion_export.pipeline.run import predict

SAMPLES = Path(__file__).parents[1] / "samples"
TEXTS = ["ba be bi", "DA [MASK] de di do", "ko " * 60]
OLD = "sentence_transformers.models."
V5 = "sentence_transformers.sentence_transformer.modules.pooling."
V6 = "sentence_transformers.base.modules."
SETTINGS = "config_sentence_transformers.json"
WIDTH = 32


def pooling(*modes):
    """An older file's switches."""
    names = {"cls": "cls_token", "lasttoken": "lasttoken", "weightedmean": "weightedmean_tokens"}
    switches = {f"pooling_mode_{names.get(mode, f'{mode}_tokens')}": True for mode in modes}
    return {"word_embedding_dimension": WIDTH, "pooling_mode_cls_token": False} | switches


def dense(wide, narrow, activation, seed=0, **settings):
    """A Dense's settings and weights."""
    chooser = np.random.default_rng(seed)
    weights = {"linear.weight": chooser.normal(0, 0.3, (narrow, wide))}
    if settings.get("bias", True):
        weights["linear.bias"] = chooser.normal(0, 0.3, narrow)
    if settings.get("use_residual") and wide != narrow:
        weights["residual.weight"] = chooser.normal(0, 0.3, (narrow, wide))
    name = f"torch.nn.modules.{activation}"
    settings = {"in_features": wide, "out_features": narrow, "activation_function": name} | settings
    return settings, weights


NORM = {"norm.weight": np.linspace(0.5, 1.5, 32), "norm.bias": np.linspace(-1, 1, 32)}
# Modules behind the transformer as (type, settings, weights), other files, the label, the width.
PIPELINES = {
    "cls": ([(f"{OLD}Pooling", pooling("cls"), {})], {}, "cls", 32),
    "mean, normalised": (
        [(f"{OLD}Pooling", pooling("mean"), {}), (f"{OLD}Normalize", None, {})],
        {"sentence_bert_config.json": {"max_seq_length": 6, "do_lower_case": True}},
        "mean+normalize",
        32,
    ),
    "dense": (
        [
            (f"{V5}Pooling", {"embedding_dimension": 32, "pooling_mode": "lasttoken"}, {}),
            (f"{V6}dense.Dense", *dense(32, 7, "activation.Tanh")),
            (f"{V6}dense.Dense", *dense(7, 9, "activation.GELU", bias=False, use_residual=True)),
            (f"{V6}normalize.Normalize", {"module_input_name": "sentence_embedding"}, {}),
        ],
        {},
        "lasttoken+dense+dense+normalize",
        9,
    ),
    "several modes": (
        [(f"{OLD}Pooling", pooling("mean_sqrt_len", "max", "weightedmean"), {})],
        {SETTINGS: {"truncate_dim": 70}},
        "max,mean_sqrt_len_tokens,weightedmean",
        70,
    ),
    "a prompt left out": (
        [
            (
                f"{V5}Pooling",
                {"pooling_mode": ["cls", "weightedmean"], "include_prompt": False}
                | {"embedding_dimension": 32},
                {},
            ),
            (f"{OLD}Dropout", {"dropout": 0.5}, {}),
        ],
        {
            SETTINGS: {
                "prompts": {"query": "fa la: ", "document": ""},
                "default_prompt_name": "query",
            }
        },
        "cls,weightedmean",
        64,
    ),
    "token vectors": (
        [
            (
                f"{V6}dense.Dense",
                *dense(32, 32, "activation.SiLU", module_input_name="token_embeddings"),
            ),
            (f"{OLD}Pooling", pooling("mean"), {}),
            (f"{OLD}LayerNorm", {"dimension": 32}, NORM),
        ],
        {SETTINGS: {"prompts": {"q": "bo "}, "default_prompt_name": "q"}},
        "dense+mean+layernorm",
        32,
    ),
}  # fmt: skip


def write_pipeline(directory, modules, others=()):
    """The files of sentence-transformers, with a folder for each module behind the transformer."""
    listed = [{"idx": 0, "name": "0", "path": "", "type": f"{OLD}Transformer"}]
    for index, (kind, settings, weights) in enumerate(modules, 1):
        path = f"{index}_{kind.rpartition('.')[2]}"
        listed.append({"idx": index, "name": str(index), "path": path, "type": kind})
        if settings is None:
            continue
        (directory / path).mkdir()
        (directory / path / "config.json").write_text(json.dumps(settings))
        if weights:
            arrays = {name: values.astype(np.float32) for name, values in weights.items()}
            save_file(arrays, directory / path / "model.safetensors")
    (directory / "modules.json").write_text(json.dumps(listed))
    for name, content in dict(others).items():
        (directory / name).write_text(json.dumps(content))
    return directory


BERT = "sentence_bert_config.json"


def sentence_transformer(directory):
    return pytest.importorskip("sentence_transformers").SentenceTransformer(
        str(directory), device="cpu"
    )


def embeddings(artifact, texts=TEXTS, **options):
    return np.array([item["embedding"] for item in predict(artifact, text=texts, **options)])


def changed(directory, name, **settings):
    file = directory / name
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | settings))
