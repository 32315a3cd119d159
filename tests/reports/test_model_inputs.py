"""What a model is for beside its text must reach it, or be refused: zeros give another answer.

LayoutLM reads where each word stands, XLM in which language it is, ERNIE for which task, RoCBert
how it looks and sounds. Without a word all of them were computed without it.
"""

import inspect
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from transformers.utils import DummyObject

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.model_inputs import check_inputs, extra_inputs
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.engine.profiles import choose_profiles
from propulsion_export.errors import BaseModelError, DataError, UsageError
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import check_parity
from propulsion_export.pipeline.run import predict
from propulsion_export.serving.requests import as_given
from propulsion_export.serving.session import Session
from propulsion_export.training.options import TrainOptions
from propulsion_export.training.trainer import train

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
XLM = {"vocab_size": 100, "emb_dim": 32, "n_layers": 1, "n_heads": 4, "max_position_embeddings": 40}
XLM |= {"embed_init_std": 0.5, "init_std": 0.2, "pad_index": 0, "pad_token_id": 0, "mask_index": 4}
# By model: its configuration, and the inputs that it has beside those of a text.
TRACED = {
    "layoutlm": ("LayoutLM", SIZES | {"max_2d_position_embeddings": 1024}, {"bbox": (4,)}),
    "lilt": (
        "Lilt",
        SIZES | {"max_2d_position_embeddings": 1024, "max_position_embeddings": 42}
        | {"channel_shrink_ratio": 2, "hidden_size": 48},
        {"bbox": (4,)},
    ),
    "xlm": ("XLM", XLM | {"n_langs": 3, "use_lang_emb": True}, {"langs": ()}),
    "ernie": ("Ernie", SIZES | {"use_task_id": True}, {"task_type_ids": ()}),
    "roc_bert": (
        "RoCBert",
        SIZES
        | {"shape_vocab_size": 50, "pronunciation_vocab_size": 30, "shape_embed_dim": 8}
        | {"pronunciation_embed_dim": 8, "concat_input": True},
        {"input_shape_ids": (), "input_pronunciation_ids": ()},
    ),
}  # fmt: skip


def make(name, settings, ending="Model", **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings | more)
    model = getattr(transformers, name + ending)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval().requires_grad_(False)


@pytest.fixture
def saved(tiny_tokenizer, tmp_path):
    """`saved("layoutlm")`: a tiny checkpoint with a tokenizer, and the model."""

    def write(kind):
        name, settings, _ = TRACED[kind]
        model = make(name, settings)
        model.save_pretrained(tmp_path / "base")
        tiny_tokenizer.save_pretrained(tmp_path / "base")
        return tmp_path / "base", model

    return write


def batch(model, rows=2, length=6):
    """Inputs of every kind that the model has, drawn anew."""
    chooser = np.random.default_rng(5)
    inputs = {
        "input_ids": chooser.integers(5, 99, (rows, length)),
        "attention_mask": np.ones((rows, length), np.int64),
    }
    if getattr(model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = np.zeros((rows, length), np.int64)
    for extra in extra_inputs(model.config):
        inputs[extra.name] = extra.draw(chooser, (rows, length))
    return inputs


def computed(model, inputs):
    tensors = {name: torch.from_numpy(values) for name, values in inputs.items()}
    with torch.inference_mode():
        return model(**tensors).last_hidden_state.numpy()


def outputs(session, inputs):
    return np.stack([reply.outputs["last_hidden_state"] for reply in session(inputs)])


@pytest.mark.parametrize("kind", TRACED)
def test_what_the_model_is_for_is_an_input_of_the_graph(kind, saved, tmp_path):
    source, model = saved(kind)
    _, _, extra = TRACED[kind]
    export_onnx([], tmp_path / "onnx", model=str(source), task="feature-extraction")

    read = Artifact.read(tmp_path / "onnx")
    shapes = {spec.name: spec.shape for spec in read.manifest.inputs}
    assert {name: shapes[name] for name in extra} == {
        name: ("batch", "sequence", *size) for name, size in extra.items()
    }
    inputs = batch(model)
    expected = computed(model, inputs)
    found = outputs(Session(read), inputs)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    # The twin: with zeros in its place the answer is another one.
    name = next(iter(extra))
    assert np.abs(computed(model, {**inputs, name: inputs[name] * 0}) - expected).max() > 0.01
    assert kind not in ("layoutlm", "xlm") or check_parity(tmp_path / "onnx").passed
    (profile,) = choose_profiles(read.manifest.inputs, ({}, {}, {}), 40)
    assert profile[name]["max"] == [32, 40, *extra[name]]


@pytest.mark.parametrize("kind", ["layoutlm", "xlm"])
def test_a_text_alone_is_refused_by_name(kind, saved, tmp_path, positive_adapter, write_adapter):
    source, model = saved(kind)
    adapter = write_adapter(positive_adapter(model, embeddings=False), tmp_path / "adapter")
    merge(adapter, tmp_path / "merged", model=str(source), task="feature-extraction")
    name = next(iter(TRACED[kind][2]))

    with pytest.raises(UsageError, match=f"the model needs {name}, .* which no text gives"):
        predict(tmp_path / "merged", text=["ba be"])

    inputs = batch(model)
    merged = transformers.AutoModel.from_pretrained(tmp_path / "merged")
    session = Session(tmp_path / "merged")
    np.testing.assert_allclose(outputs(session, inputs), computed(merged, inputs), atol=1e-5)
    del inputs[name]
    with pytest.raises(UsageError, match=f"expected {name} besides"):
        session(inputs)
    texts = tmp_path / "texts.txt"
    texts.write_text("ba be\n" * 16)
    with pytest.raises(UsageError, match=f"--inputs: the model needs {name}"):
        check_parity(tmp_path / "merged", inputs=texts)
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "ba", "label": "a"}\n{"text": "be", "label": "b"}\n' * 4)
    with pytest.raises((UsageError, DataError), match=f"the model needs {name}"):
        train(source, data, tmp_path / "trained", options=TrainOptions())


def test_a_wrong_shape_is_said_in_words():
    extras = {"bbox": extra_inputs(transformers.LayoutLMConfig())[0]}
    inputs = {"input_ids": np.ones((2, 6), np.int64), "bbox": np.ones((2, 6, 4), np.int64)}

    assert as_given(inputs, {*inputs}, set(), extras).keys() == inputs.keys()
    with pytest.raises(UsageError, match=r"expected whole numbers \[batch, sequence, 4\]"):
        as_given({**inputs, "bbox": inputs["bbox"][..., 0]}, {*inputs}, set(), extras)
    with pytest.raises(UsageError, match="expected one shape"):
        as_given({**inputs, "bbox": inputs["bbox"][:, :2]}, {*inputs}, set(), extras)


def test_a_text_for_ernie_is_for_task_zero_as_in_transformers(saved, tmp_path):
    source, model = saved("ernie")
    export_onnx([], tmp_path / "onnx", model=str(source), task="feature-extraction")
    tokens = transformers.AutoTokenizer.from_pretrained(source)("ba be bi", return_tensors="pt")
    tokens = {name: tokens[name] for name in ("input_ids", "attention_mask")}

    (found,) = predict(tmp_path / "onnx", text=["ba be bi"])

    with torch.inference_mode():
        expected = model(**tokens).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(found["embedding"], expected, atol=1e-5)
    inputs = batch(model)
    del inputs["task_type_ids"]
    zeros = {**inputs, "task_type_ids": np.zeros_like(inputs["input_ids"])}
    np.testing.assert_array_equal(
        outputs(Session(tmp_path / "onnx"), inputs), outputs(Session(tmp_path / "onnx"), zeros)
    )


def test_a_text_for_rocbert_comes_with_its_signs_and_sounds(tmp_path):
    name, settings, _ = TRACED["roc_bert"]
    model = make(name, settings)
    base = tmp_path / "base"
    model.save_pretrained(base)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (base / "vocab.txt").write_text("\n".join(words))
    chooser = np.random.default_rng(3)
    for file, most in (("word_shape.json", 50), ("word_pronunciation.json", 30)):
        numbers = chooser.permutation(most)[: len(words)].tolist()
        (base / file).write_text(json.dumps(dict(zip(words, numbers, strict=True))))
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "RoCBertTokenizer"}')
    export_onnx([], tmp_path / "onnx", model=str(base), task="feature-extraction")
    for file in ("word_shape.json", "word_pronunciation.json"):
        shutil.copy(base / file, tmp_path / "onnx" / file)

    found = predict(tmp_path / "onnx", text=["a b c", "d"])

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    for text, item in zip(["a b c", "d"], found, strict=True):
        tokens = tokenizer(text, return_tensors="pt")
        assert tokens["input_shape_ids"].any()
        with torch.inference_mode():
            expected = model(**tokens).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(item["embedding"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("XLM", XLM | {"n_langs": 1}),
        ("Ernie", SIZES | {"use_task_id": False}),
        ("Bert", SIZES),
        ("RoCBert", SIZES | {"enable_shape": False, "enable_pronunciation": False}),
    ],
)
def test_a_model_without_weights_for_it_has_no_such_input(name, settings):
    config = getattr(transformers, f"{name}Config")(**settings)

    assert extra_inputs(config) == ()
    check_inputs(getattr(transformers, f"{name}Model"), config, "base")


# What is not traced is refused by name

REFUSED = {
    "LUKE": (
        "Luke",
        SIZES | {"entity_vocab_size": 20, "entity_emb_size": 16, "pad_token_id": 1},
        "entity_ids",
    ),
    "MarkupLM": (
        "MarkupLM",
        SIZES | {"max_depth": 4, "xpath_unit_hidden_size": 8},
        "xpath_tags_seq, xpath_subs_seq",
    ),
    "BROS": ("Bros", SIZES | {"dim_bbox": 8}, "bbox"),
    "X-MOD": ("Xmod", SIZES | {"languages": ["en_XX", "de_DE"], "pad_token_id": 1}, "lang_ids"),
    "ViT": ("ViT", {**SIZES, "image_size": 8, "patch_size": 4}, "pixel_values"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_another_input_is_refused_by_name_before_anything_is_written(kind, tmp_path):
    name, settings, inputs = REFUSED[kind]
    make(name, settings).save_pretrained(tmp_path / "base")

    with pytest.raises(BaseModelError, match=f"{name}Model is also for {inputs}") as refused:
        export_onnx([], tmp_path / "onnx", model=str(tmp_path / "base"), task="feature-extraction")

    assert refused.value.exit_code == 4
    assert not (tmp_path / "onnx").exists()


def test_a_merged_checkpoint_of_such_a_model_is_whole_but_not_run(
    tmp_path, tiny_tokenizer, positive_adapter, write_adapter
):
    name, settings, _ = REFUSED["LUKE"]
    model = make(name, settings)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    adapter = write_adapter(positive_adapter(model, embeddings=False), tmp_path / "adapter")

    merge(adapter, tmp_path / "merged", model=str(tmp_path / "base"), task="feature-extraction")

    assert (
        transformers.AutoModel.from_pretrained(tmp_path / "merged").config.entity_vocab_size == 20
    )
    for use in (lambda: predict(tmp_path / "merged", text=["ba"]), lambda: judge(tmp_path)):
        with pytest.raises(BaseModelError, match="is also for entity_ids"):
            use()


def judge(directory):
    return check_parity(directory / "merged")


def test_a_language_that_a_config_names_is_enough(tmp_path):
    name, settings, _ = REFUSED["X-MOD"]
    config = make(name, settings, default_language="de_DE").config

    check_inputs(transformers.XmodModel, config, "base")


# Every class that a task of ours may load

TEXT = {"input_ids", "attention_mask", "token_type_ids", "inputs_embeds", "position_ids"}
LEFT_OUT = {
    *("self", "kwargs", "labels", "start_positions", "end_positions", "return_loss"),
    *("return_dict", "output_hidden_states", "output_attentions", "output_router_logits"),
    *("logits_to_keep", "use_cache", "cache", "mems", "use_mems", "state", "past_buckets_states"),
    *("encoder_outputs", "mm_encoder_outputs", "encoder_hidden_states", "encoder_attention_mask"),
    *("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"),
    *("decoder_position_ids", "lengths", "num_hashes", "per_layer_inputs", "ple_input_ids"),
    *("patch_lengths", "sequence_id", "question_lengths", "question_positions", "input_mask"),
    *("global_attention_mask", "perm_mask", "target_mapping", "deprecated_arguments"),
    *("visual_pos_masks", "deepstack_visual_embeds", "shared_kv_states"),
    *("cross_attention_states", "cross_attention_mask", "full_text_row_masked_out_mask"),
    *("bbox_first_token_mask", "entity_labels"),
    *("speaker_id", "speaking_rate"),  # numbers, of VITS
}
MAY_BE_UNUSED = {"langs", "lang_ids", "task_type_ids"}


def classes():
    """Every class of transformers that a task's auto class loads, with its task and its defaults.

    Code of a checkpoint that another test has run may be among a task's classes too.
    """
    for task in TASKS.values():
        mapping = getattr(transformers, task.auto_class)._model_mapping
        for config_class in list(mapping.keys()):
            try:
                found, config = mapping[config_class], config_class()
            except Exception:  # it needs a package, or has no defaults
                continue
            for each in found if isinstance(found, tuple) else (found,):
                own = each.__module__.startswith("transformers.")
                if own and not isinstance(each, DummyObject):  # it needs a package
                    yield task, each, config


@pytest.mark.filterwarnings("ignore")  # what configurations think of their own defaults
def test_every_input_of_every_class_is_traced_or_refused_by_name():
    walked, lost, needless = 0, [], []
    for task, model_class, config in classes():
        taken = set(inspect.signature(model_class.forward).parameters)
        extra = taken - TEXT - LEFT_OUT
        traced = {each.name for each in extra_inputs(config)}
        try:
            check_inputs(model_class, config, "base", generates=task.generates)
        except BaseModelError as error:
            named = extra or "input_ids" not in taken or "cells" in str(error)
            needless += [] if named else [model_class.__name__]
            continue
        walked += 1
        lost += [f"{model_class.__name__}: {name}" for name in extra - traced - MAY_BE_UNUSED]

    assert not needless
    assert not lost
    assert walked > 600
