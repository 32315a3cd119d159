"""A sentence encoder is more than its transformer: what is pooled, projected and normalised.

Without `modules.json` and its folders a merged all-MiniLM-L6-v2 gives vectors of length 12 instead
of 1, and one that pools the first token gives other vectors altogether.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from safetensors.numpy import save_file
from transformers import AutoModel, AutoTokenizer
from tritonclient.grpc.model_config_pb2 import ModelConfig

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.changing import add_adapter
from propulsion_export.base_model.sentences.files import read_sentence_pipeline
from propulsion_export.base_model.sentences.modules import copy_sentence_pipeline
from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.package import package
from propulsion_export.pipeline.parity import check_parity
from propulsion_export.pipeline.run import predict
from propulsion_export.serving.session import Session

SAMPLES = Path(__file__).parents[2] / "samples"
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


@pytest.fixture
def plain(make_world):
    return make_world("bert", "feature-extraction")


@pytest.fixture
def base(plain, tmp_path):
    """`base("cls")`: a copy of the tiny BERT with that pipeline."""

    def make(name, directory="base"):
        copied = shutil.copytree(plain.base, tmp_path / directory)
        modules, others, _, _ = PIPELINES[name]
        return write_pipeline(copied, modules, others)

    return make


def sentence_transformer(directory):
    return pytest.importorskip("sentence_transformers").SentenceTransformer(
        str(directory), device="cpu"
    )


def embeddings(artifact, texts=TEXTS, **options):
    return np.array([item["embedding"] for item in predict(artifact, text=texts, **options)])


@pytest.mark.parametrize("name", PIPELINES)
def test_a_merged_checkpoint_embeds_as_sentence_transformers_does(name, base, plain, tmp_path):
    merge(plain.one, tmp_path / "merged", model=str(base(name)))

    found = predict(tmp_path / "merged", text=TEXTS)

    expected = sentence_transformer(tmp_path / "merged").encode(TEXTS)
    _, _, label, width = PIPELINES[name]
    assert expected.shape == (3, width)
    own = np.array([item["embedding"] for item in found])
    np.testing.assert_allclose(own, expected, atol=2e-6)
    assert {item["pooling"] for item in found} == {label}
    assert not any("note" in item for item in found)
    # The twin that the adapter is in it: the base's embeddings are others.
    other = sentence_transformer(tmp_path / "base").encode(TEXTS)
    assert np.abs(other - expected).max() > 0.01


def test_all_minilm_keeps_its_norm_of_one(tmp_path, positive_adapter, write_adapter, monkeypatch):
    monkeypatch.syspath_prepend(SAMPLES)
    from minilm import model_directory

    source = model_directory()
    adapter = positive_adapter(
        AutoModel.from_pretrained(source), embeddings=False, only="attention"
    )
    directory = write_adapter(replace(adapter, task="feature-extraction"), tmp_path / "adapter")
    merge(directory, tmp_path / "merged", model=str(source))
    texts = ["A cat sat on the mat.", "Where is the nearest station?", "cats " * 400]

    expected = sentence_transformer(tmp_path / "merged").encode(texts)

    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(embeddings(tmp_path / "merged", texts), expected, atol=2e-6)


def by_hand(directory, text, pool):
    tokens = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt")
    with torch.inference_mode():
        return pool(AutoModel.from_pretrained(directory)(**tokens).last_hidden_state[0]).numpy()


@pytest.mark.parametrize(
    ("name", "mode", "pool"),
    [
        ("cls", "switchable", lambda hidden: hidden[0]),
        ("mean, normalised", "folded", lambda hidden: hidden.mean(0) / hidden.mean(0).norm()),
        (None, None, lambda hidden: hidden.mean(0)),  # as before, and it says so
    ],
)
def test_every_kind_of_export_pools_alike(name, mode, pool, base, plain, tmp_path):
    source = str(plain.base if name is None else base(name))
    merge(plain.one, tmp_path / "merged", model=source)
    expected = [by_hand(tmp_path / "merged", text, pool) for text in ("ba be", "do")]

    sessions = [Session(tmp_path / "merged")]
    if mode is not None:
        export_onnx([plain.one], tmp_path / mode, model=source, mode=mode)
        sessions.append(Session(tmp_path / mode))
    if mode == "switchable":
        package(tmp_path / mode, tmp_path / "served", layout="onnx-adapter")
        sessions.append(Session(tmp_path / "served"))

    replies = [reply for session in sessions for reply in session(["ba be", "do"], "one")]
    for reply, row in zip(replies, expected * len(sessions), strict=True):
        np.testing.assert_allclose(reply.prediction["embedding"], row, atol=2e-5)
        assert reply.prediction["pooling"] == ("mean" if name is None else PIPELINES[name][2])
        assert ("no sentence pipeline" in reply.prediction.get("note", "")) == (name is None)


# What cannot be computed here is refused before anything is written


def changed(directory, name, **settings):
    file = directory / name
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | settings))


def retyped(directory, kind, path=None):
    listed = json.loads((directory / "modules.json").read_text())
    listed[1] |= {"type": kind} | ({} if path is None else {"path": path})
    (directory / "modules.json").write_text(json.dumps(listed))


def pickled(directory):
    file = directory / "2_Dense" / "model.safetensors"
    file.rename(file.with_name("pytorch_model.bin"))


BERT = "sentence_bert_config.json"
WRONG = {
    "layers": (lambda d: retyped(d, f"{OLD}WeightedLayerPooling"), "names WeightedLayerPooling"),
    "cnn": (lambda d: retyped(d, "sentence_transformers.models.CNN"), "modules.json names CNN"),
    "own code": (lambda d: retyped(d, "custom_st.Pooling"), "names custom_st.Pooling"),
    "outside": (lambda d: retyped(d, f"{OLD}Pooling", "../other"), "leads out of the directory"),
    "in the root": (lambda d: retyped(d, f"{OLD}Pooling", ""), "expected a folder of its own"),
    "pickle": (pickled, "pytorch_model.bin only, which may run code"),
    "activation": (
        lambda d: changed(d, "2_Dense/config.json", activation_function="torch.nn.Softmax2d"),
        "has the activation torch.nn.Softmax2d",
    ),
    "mode": (lambda d: changed(d, "1_Pooling/config.json", pooling_mode="median"), "by median"),
    "width": (
        lambda d: changed(d, "1_Pooling/config.json", pooling_mode=["cls", "mean"]),
        "dense takes 32 numbers, expected 64",
    ),
    "sparse": (
        lambda d: changed(d, SETTINGS, model_type="SparseEncoder"),
        "says SparseEncoder",
    ),
    "prompt": (
        lambda d: changed(d, SETTINGS, default_prompt_name="query"),
        "names the prompt 'query', which it does not have",
    ),
    "tokenizer": (
        lambda d: changed(d, BERT, tokenizer_args={"padding_side": "left"}),
        "tokenizer_args.padding_side is set",
    ),
    "chat": (
        lambda d: changed(d, BERT, modality_config={"message": {}}),
        "an output other than the last hidden state",
    ),
    "old layout": (
        lambda d: (d / "modules.json").write_text(
            json.dumps([{"path": "0_BERT", "type": f"{OLD}Transformer"}])
        ),
        "has its Transformer in 0_BERT/",
    ),
    "no settings": (
        lambda d: (d / "1_Pooling" / "config.json").unlink(),
        "Pooling in 1_Pooling/: has no config.json",
    ),
    "no list": (lambda d: (d / "modules.json").write_text("{}"), "is no list of modules"),
}  # fmt: skip


def onnx(adapter, *arguments, **options):
    return export_onnx([adapter], *arguments, **options)


@pytest.mark.parametrize(
    ("command", "kind"), [*((merge, kind) for kind in WRONG), (onnx, "pickle"), (onnx, "sparse")]
)
def test_a_pipeline_that_is_not_computed_here_is_refused_by_name(
    command, kind, base, plain, tmp_path
):
    source, (damage, message) = base("dense"), WRONG[kind]
    damage(source)

    with pytest.raises(BaseModelError) as refused:
        command(plain.one, tmp_path / "out", model=str(source))

    assert message in str(refused.value)
    assert refused.value.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_loading_options_of_speed_only_are_no_reason_to_refuse(base, plain, tmp_path):
    source = base("cls")
    changed(source, BERT, model_args={"torch_dtype": "float32"}, max_seq_length=None)

    merge(plain.one, tmp_path / "merged", model=str(source))

    assert predict(tmp_path / "merged", text=["ba"])[0]["pooling"] == "cls"


def test_a_base_on_a_hub_brings_its_folders(base, tmp_path, monkeypatch):
    revision = "0" * 40
    place = tmp_path / "hub" / "models--org--tiny"
    source = shutil.copytree(base("dense"), place / "snapshots" / revision)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    assert read_sentence_pipeline("org/tiny").label == PIPELINES["dense"][2]
    copy_sentence_pipeline("org/tiny", tmp_path / "copy")

    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "copy" / "config.json").exists()


def test_another_task_needs_no_pipeline(base, world, tmp_path):
    source = base("dense")
    pickled(source)

    merge(world.three, tmp_path / "merged", model=str(source))

    assert not (tmp_path / "merged" / "modules.json").exists()
    assert "label" in predict(tmp_path / "merged", text=["ba"])[0]


# Parity


@pytest.fixture(scope="module")
def bank(make_world, tmp_path_factory):
    """A bank of two adapters whose base leaves its prompt out; copy it before changing it."""
    plain, root = make_world("bert", "feature-extraction"), tmp_path_factory.mktemp("bank")
    source = shutil.copytree(plain.base, root / "base")
    modules, others, _, _ = PIPELINES["a prompt left out"]
    write_pipeline(source, modules, others)
    return export_onnx([plain.one, plain.two], root / "bank", model=str(source), mode="bank")


def test_parity_judges_the_embedding_too(bank):
    report = check_parity(bank.directory)

    assert report.passed
    pooling = next(check for check in report.checks if check.case == "pooling")
    assert "(cls,weightedmean)" in pooling.detail
    judged = [check for check in report.checks if check.case == "parity"]
    assert len(judged) == 3
    for check in judged:
        sizes = {output.output: output.elements for output in check.outputs}
        assert sizes["sentence_embedding"] == 16 * 64
        assert all(output.error > 0 for output in check.outputs)


def test_parity_says_that_there_is_no_pipeline(plain, tmp_path):
    merge(plain.one, tmp_path / "merged")

    report = check_parity(tmp_path / "merged")

    assert report.passed
    details = [check.detail for check in report.checks if check.case == "pooling"]
    assert len(details) == 1
    assert "there is no sentence pipeline" in details[0]


@pytest.mark.parametrize("mistake", ["pooling", "weights", "lost"])
def test_parity_fails_where_the_artifact_pools_otherwise(mistake, base, plain, tmp_path):
    merge(plain.one, tmp_path / "merged", model=str(base("dense")))
    if mistake == "pooling":
        changed(tmp_path / "merged", "1_Pooling/config.json", pooling_mode="mean")
    elif mistake == "weights":
        _, weights = dense(32, 7, "activation.Tanh", seed=1)
        arrays = {name: values.astype(np.float32) for name, values in weights.items()}
        save_file(arrays, tmp_path / "merged" / "2_Dense" / "model.safetensors")
    else:
        (tmp_path / "merged" / "modules.json").unlink()
    read = Artifact.write(tmp_path / "merged", replace_files(tmp_path / "merged"))

    report = check_parity(read.directory)

    assert not report.passed
    assert [check.case for check in report.checks if not check.passed] == ["pooling"]


def replace_files(directory):
    """The manifest as it was, to be written with the digests of the files as they are now."""
    from propulsion_export.artifacts.manifest import read_manifest

    return read_manifest(directory / "propulsion.json")


# Packages


def test_the_triton_package_says_what_a_client_has_to_do_and_the_sample_does_it(
    bank, tmp_path, monkeypatch
):
    import onnxruntime

    package(bank.directory, tmp_path / "models", layout="triton")
    model = tmp_path / "models" / "models"
    config = text_format.Parse((model / "config.pbtxt").read_text(), ModelConfig())
    assert config.parameters["pooling"].string_value == "cls,weightedmean"

    monkeypatch.syspath_prepend(SAMPLES)
    import triton_client

    monkeypatch.delitem(sys.modules, "triton_client")
    session = onnxruntime.InferenceSession(model / "1" / "model.onnx")
    names = {value.name for value in session.get_inputs()}

    def infer(client, name, tensors):
        ids = tensors["adapter_ids"][:, 0]
        feeds = {key: tensors[key].astype(np.int64) for key in names - {"adapter_ids"}}
        return {"last_hidden_state": session.run(None, {**feeds, "adapter_ids": ids})[0]}

    monkeypatch.setattr(triton_client, "infer", infer)
    answers = triton_client.predict(None, model, TEXTS, ["two", "one", "base"])

    expected = embeddings(bank.directory, adapter=["two", "one", "base"])
    np.testing.assert_allclose(answers, expected, atol=2e-5)


def test_a_modules_file_that_the_manifest_does_not_know_is_refused(base, plain, tmp_path):
    merge(plain.one, tmp_path / "merged", model=str(plain.base))
    shutil.copy(base("cls") / "modules.json", tmp_path / "merged")

    with pytest.raises(Exception, match=r"modules.json: has no digest in the manifest"):
        Artifact.read(tmp_path / "merged")


# Adapters that sentence-transformers has written bring a pipeline of their own


@pytest.fixture
def own(plain, tmp_path):
    """`own("one", "cls")`: a copy of the adapter with a pipeline of its own."""

    def make(name, kind):
        directory = shutil.copytree(getattr(plain, name), tmp_path / "own" / name)
        modules, others, _, _ = PIPELINES[kind]
        return write_pipeline(directory, modules, others)

    return make


def test_an_adapters_own_pipeline_goes_with_it(own, plain, tmp_path):
    adapter = own("one", "dense")

    merge(adapter, tmp_path / "merged", model=str(plain.base))

    expected = sentence_transformer(tmp_path / "merged").encode(TEXTS)
    np.testing.assert_allclose(embeddings(tmp_path / "merged"), expected, atol=2e-6)
    assert check_parity(tmp_path / "merged").passed


def test_adapters_of_two_pipelines_do_not_share_an_artifact(own, bank, base, plain, tmp_path):
    source, other = base("cls"), own("two", "dense")

    with pytest.raises(AdapterError, match=r"needs the sentence pipeline lasttoken\+dense"):
        export_onnx([plain.one, other], tmp_path / "bank", model=str(source), mode="bank")

    copied = shutil.copytree(bank.directory, tmp_path / "bank")
    with pytest.raises(AdapterError, match="has the sentence pipeline lasttoken"):
        add_adapter(copied, f"three={other}")
    add_adapter(copied, f"three={plain.two}")  # without one, it takes the artifact's
    expected = embeddings(bank.directory, adapter=["two"])
    np.testing.assert_array_equal(embeddings(copied, adapter=["three"]), expected)


def test_an_adapter_with_its_bases_pipeline_fits(own, base, plain, tmp_path):
    adapter = own("one", "mean, normalised")
    changed(adapter, BERT, max_seq_length=None)  # newer versions leave that to the tokenizer

    merge(adapter, tmp_path / "merged", model=str(base("mean, normalised")))

    assert Adapter.read(adapter).scales
    settings = json.loads((tmp_path / "merged" / BERT).read_text())
    assert settings["max_seq_length"] == 6
