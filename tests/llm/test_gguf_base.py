"""A GGUF file as the base model of every command."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from gguf_files import tiny_language_model, write_gguf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from propulsion_export import (
    Adapter,
    Artifact,
    Session,
    TrainOptions,
    check_parity,
    export_onnx,
    merge,
    train,
)
from propulsion_export.base_model.config import read_config
from propulsion_export.base_model.loading import load_base
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.base_model.tokenizer.reading import copy_tokenizer, read_tokenizer
from propulsion_export.cli import main
from propulsion_export.errors import BaseModelError

TEXTS = [
    f"the {word} sees the {other}" for word in ("cat", "dog", "owl") for other in ("sun", "sea")
]


@pytest.fixture(scope="module")
def model():
    return tiny_language_model("llama", seed=3)


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "base.gguf", model, quantisation="Q8_0")


@pytest.fixture(scope="module")
def checkpoint(file, tmp_path_factory):
    """What transformers saves of the model in the file."""
    directory = tmp_path_factory.mktemp("safetensors")
    load_base(str(file), task="text-generation").model.save_pretrained(directory)
    copy_tokenizer(str(file), directory)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def trained(base, data, output):
    options = TrainOptions(task="text-generation", epochs=3, learning_rate=0.05, max_length=32)
    train(str(base), str(data), output, options=options)
    return output


@pytest.fixture(scope="module")
def adapter(file, data, tmp_path_factory):
    return trained(file, data, tmp_path_factory.mktemp("adapter") / "tuned")


@pytest.mark.parametrize("quantisation", [None, "F16", "BF16"])
def test_a_float_file_is_the_checkpoint_that_it_was_made_of(quantisation, model, tmp_path):
    file = write_gguf(tmp_path / "base.gguf", model, quantisation=quantisation)

    found = fingerprint_of_model(load_base(str(file), task="text-generation").model)

    assert fingerprint_of_model(model).difference(found) is None


def test_another_model_is_not_the_base(model, tmp_path):
    file = write_gguf(tmp_path / "base.gguf", tiny_language_model("llama", seed=4))

    found = fingerprint_of_model(load_base(str(file), task="text-generation").model)

    assert fingerprint_of_model(model).difference(found)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_weights_are_those_of_transformers_own_reader(kind, model, tmp_path):
    file = write_gguf(tmp_path / "base.gguf", model, quantisation=kind)

    loaded = load_base(str(file), task="text-generation").model

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name).state_dict()
    assert loaded.dtype == torch.float32
    assert "quantization_config" not in loaded.config.to_dict()
    for name, values in loaded.state_dict().items():
        assert torch.equal(values, theirs[name]), name


def test_an_adapter_records_the_file_and_its_fingerprint(adapter, file):
    read = Adapter.read(adapter)

    assert read.base == str(file)
    found = fingerprint_of_model(load_base(str(file), task="text-generation").model)
    assert read.fingerprint.difference(found) is None


def test_an_adapter_of_a_file_is_one_of_its_safetensors_and_the_other_way(
    adapter, file, checkpoint, data, tmp_path
):
    other = trained(checkpoint, data, tmp_path / "other")

    ours = merge(adapter, tmp_path / "a", model=str(checkpoint)).directory
    theirs = merge(other, tmp_path / "b", model=str(file)).directory

    assert Adapter.read(other).base == str(checkpoint)
    assert (
        load_file(ours / "model.safetensors").keys()
        == load_file(theirs / "model.safetensors").keys()
    )


def test_merging_into_a_file_is_merging_into_its_safetensors(adapter, file, checkpoint, tmp_path):
    ours = merge(adapter, tmp_path / "a").directory  # the base that the adapter names
    theirs = merge(adapter, tmp_path / "b", model=str(checkpoint)).directory

    found, expected = (load_file(place / "model.safetensors") for place in (ours, theirs))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    config = json.loads((ours / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert Artifact.read(ours).manifest.base.source == str(file)
    assert (ours / "chat_template.jinja").is_file()
    texts = [place.read_text(encoding="utf-8") for place in ours.glob("*.json")]
    assert not any("propulsion-export-gguf" in text for text in texts)  # where they were read from
    assert AutoTokenizer.from_pretrained(ours).encode("the 12") == [261, 224, 20, 21]
    assert AutoModelForCausalLM.from_pretrained(ours).generation_config.eos_token_id == 2


def test_a_merged_file_is_in_parity_and_a_wrong_one_is_not(adapter, tmp_path):
    artifact = merge(adapter, tmp_path / "merged")

    assert check_parity(artifact.directory).passed

    weights = artifact.directory / "model.safetensors"
    values = load_file(weights)
    values["model.layers.0.self_attn.q_proj.weight"][0] *= 1.01
    save_file(values, weights, {"format": "pt"})
    Artifact.write(artifact.directory, artifact.manifest)
    assert not check_parity(artifact.directory).passed


def test_a_merged_file_is_run(adapter, tmp_path, capsys):
    merge(adapter, tmp_path / "merged")

    with pytest.raises(SystemExit) as exit_:
        main(["run", str(tmp_path / "merged"), "--text", "the cat", "--json"])

    assert exit_.value.code == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("exporter", ["transformers", "genai"])
def test_an_export_is_in_parity_and_generates(exporter, adapter, file, tmp_path):
    artifact = export_onnx(
        [adapter],
        tmp_path / "graph",
        mode="switchable",
        model=str(file.parent),
        exporter=exporter,
    )

    assert artifact.manifest.exporter == exporter
    assert artifact.manifest.base.source == str(file)
    assert check_parity(artifact.directory).passed
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (artifact.directory / name).is_file()
    (reply,) = Session(artifact.directory)(["the cat"])
    assert reply.prediction["generated"]


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_a_classifier_takes_a_file_too(task, file):
    base = load_base(str(file), task=task)

    assert base.missing
    assert base.missing <= base.label_parameters | {"score.bias"}


def test_tokens_and_templates_are_those_of_the_file(file):
    tokenizer = read_tokenizer(str(file))

    assert tokenizer.encode("the 12") == [261, 224, 20, 21]
    assert tokenizer.decode([261, 224, 20]) == "the 1"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<s>",
        "</s>",
        "<pad>",
    )
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert chat == "<|user|>the</s>"
    assert tokenizer.encode(chat) == [3, 261, 2]


def test_other_ends_of_a_turn_end_generation_too(model, tmp_path):
    keys = {"tokenizer.ggml.eot_token_id": 3}
    file = write_gguf(tmp_path / "base.gguf", model, keys=keys)

    assert load_base(str(file), task="text-generation").model.generation_config.eos_token_id == [
        2,
        3,
    ]


def test_a_tokenizer_that_cuts_texts_in_an_unknown_way_is_refused(model, tmp_path):
    file = write_gguf(tmp_path / "base.gguf", model, keys={"tokenizer.ggml.pre": "unheard-of"})

    with pytest.raises(
        BaseModelError, match=r"cuts texts as 'unheard-of' does, expected one of those"
    ):
        read_config(str(file))


def test_inspect_says_what_a_file_is(file, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["inspect", str(file), "--json"])

    value = json.loads(capsys.readouterr().out)
    assert exit_.value.code == 0
    assert (value["architecture"], value["kind"]) == ("llama", "gguf")
    assert value["types"].keys() == {"Q8_0", "F32"}
    assert value["bytes"] == file.stat().st_size


COMMANDS = {
    "train": ["train", "-m", "{base}", "-d", "{data}", "-o", "{out}", "--task", "text-generation"],
    "merge": ["merge", "-m", "{base}", "-a", "{adapter}", "-o", "{out}"],
    "onnx": ["onnx", "-m", "{base}", "-a", "{adapter}", "-o", "{out}"],
    "inspect": ["inspect", "{base}"],
}
BAD = {
    "empty": (lambda content: b"", "is empty"),
    "not-gguf": (lambda content: b"PK" + content[2:], "does not begin with GGUF"),
    "truncated-header": (lambda content: content[:1000], "truncated or damaged"),
    "truncated-tensors": (lambda content: content[:-5000], "truncated or damaged"),
}


@pytest.mark.parametrize("damage", BAD)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_file_is_one_line_and_writes_nothing(
    command, damage, file, adapter, data, tmp_path, capsys
):
    change, message = BAD[damage]
    bad, out = tmp_path / "bad.gguf", tmp_path / "out"
    bad.write_bytes(change(file.read_bytes()))
    places = {"base": bad, "data": data, "adapter": adapter, "out": out}

    with pytest.raises(SystemExit) as exit_:
        main([word.format(**places) for word in COMMANDS[command]] + ["-q"])

    lines = capsys.readouterr().err.strip().splitlines()
    assert exit_.value.code == 4
    assert len(lines) == 1
    assert message in lines[0]
    assert not out.exists()


def test_without_the_package_gguf_this_machine_cannot(file, adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    copy = tmp_path / "copy.gguf"  # nothing is known of it yet
    copy.write_bytes(file.read_bytes())

    with pytest.raises(SystemExit) as exit_:
        main(["merge", "-m", str(copy), "-a", str(adapter), "-o", str(tmp_path / "out")])

    assert exit_.value.code == 3
    assert "pip install 'propulsion-export[gguf]'" in capsys.readouterr().err


def test_entries_are_those_of_the_whole_tensor(file):
    from propulsion_export.base_model.gguf.weights import gguf_tensors

    tensor = gguf_tensors(str(file))["model.layers.1.self_attn.k_proj.weight"]

    assert tensor[3, 5] == float(tensor.read()[3, 5])
    assert np.array_equal(tensor[...].numpy(), tensor.read().numpy())


def test_a_base_that_moved_with_its_adapter_is_found_beside_it(adapter, file, tmp_path):
    moved = tmp_path / "tuned"
    shutil.copytree(adapter, moved)
    shutil.copyfile(file, tmp_path / "base.gguf")
    config = json.loads((moved / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = "base.gguf"
    (moved / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")

    merged = merge(moved, tmp_path / "merged")

    assert merged.manifest.base.source == str(tmp_path / "base.gguf")


def test_the_card_names_the_file_as_transformers_takes_it(adapter, file):
    card = (adapter / "README.md").read_text(encoding="utf-8")

    assert f'from_pretrained("{file.parent}", gguf_file="base.gguf")' in card
