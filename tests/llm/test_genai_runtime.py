"""onnxruntime-genai loads artifacts of its builder's graphs as they are, and packages of them."""

import json
import shutil
from dataclasses import replace

import numpy as np
import onnxruntime_genai as og
import pytest

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.changing import add_adapter, compact_bank, remove_adapter
from propulsion_export.cli import main
from propulsion_export.errors import ArtifactError, UsageError
from propulsion_export.pipeline.package import package
from propulsion_export.pipeline.run import predict

NEW = 32
# Two of one length, and one that is shorter.
PROMPTS = ((17, 60, 5, 93, 41, 8, 77, 30, 12), (88, 14, 73, 35, 21, 96, 50, 9, 28), (50, 9, 28, 66))
NAMES = ("base", "one", "two")


@pytest.fixture(scope="session")
def by_transformers(genai_world):
    """`by_transformers(kind, prompt, name)`: PyTorch's greedy tokens."""
    import torch

    from propulsion_export.scaling.attach import attached

    def generate(kind, prompt, name):
        world = genai_world(kind)
        adapter = Adapter(name="none", scales={})
        if name != "base":
            adapter = Adapter.read(getattr(world, name), name)
        tokens = torch.tensor([prompt])
        with attached(world.model, adapter):
            found = world.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
            )
        return found[0, len(prompt) :].tolist()

    return generate


def by_genai(model, prompts, prepare=lambda generator: None):
    """The tokens that onnxruntime-genai generates for one batch, padded on the right."""
    longest = max(map(len, prompts))
    params, length = og.GeneratorParams(model), longest + NEW
    params.set_search_options(batch_size=len(prompts), max_length=length, min_length=length)
    generator = og.Generator(model, params)
    prepare(generator)
    padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
    generator.append_tokens(np.array(padded, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row)[longest:].tolist() for row in range(len(prompts))]


@pytest.fixture(scope="session")
def packaged(genai_artifact, shared):
    """`packaged(kind, mode)`: a package of the artifact; copy it before changing it."""

    def make(kind, mode="switchable"):
        def fill(root):
            package(genai_artifact(kind, mode), root / "served", layout="genai")

        return shared(f"genai-package-{kind}-{mode}", fill) / "served"

    return make


def switching(model, directory):
    """`switching(model, directory)(name)` prepares a generator to use an adapter."""
    adapters = og.Adapters(model)
    for name in NAMES[1:]:
        adapters.load(str(directory / "adapters" / f"{name}.onnx_adapter"), name)

    def choose(name):
        def prepare(generator):
            if name != "base":
                generator.set_active_adapter(adapters, name)

        return prepare

    return choose


def banked(bank, ids):
    """Prepare a generator to read rows of a bank; the arrays must outlive it."""

    def prepare(generator):
        generator.set_model_input("propulsion_bank", bank)
        generator.set_model_input("adapter_ids", ids)

    return prepare


# The artifact as it is


@pytest.mark.parametrize("kind", ["llama", "gemma2", "lfm2", "hunyuan"])
def test_artifact_loads_as_it_is_and_generates_the_base_models_tokens(
    kind, genai_artifact, by_transformers
):
    model = og.Model(str(genai_artifact(kind)))

    assert by_genai(model, PROMPTS[:1]) == [by_transformers(kind, PROMPTS[0], "base")]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "lfm2", "hunyuan"])
def test_rows_of_a_bank_are_chosen_by_their_ids(kind, genai_artifact, by_transformers):
    artifact = Artifact.read(genai_artifact(kind, "bank"))
    model = og.Model(str(artifact.directory))
    bank = np.array(artifact.feeds("base")["propulsion_bank"])  # it must be writable
    number = {name: artifact.feeds(name)["adapter_ids"][0] for name in NAMES}
    asked = [(prompt, name) for name in ("two", "base", "one") for prompt in PROMPTS[:2]]
    ids = np.array([number[name] for _, name in asked])

    found = by_genai(model, [prompt for prompt, _ in asked], banked(bank, ids))

    assert found == [by_transformers(kind, *row) for row in asked]
    assert len({tuple(tokens) for tokens in found}) == len(asked)


# Packages


@pytest.mark.parametrize("kind", ["llama", "gemma2", "lfm2", "hunyuan"])
def test_package_has_the_builders_configuration_and_adapter_files(
    kind, packaged, genai_artifact, by_transformers
):
    directory = packaged(kind)
    model = og.Model(str(directory))
    choose = switching(model, directory)

    config = json.loads((directory / "genai_config.json").read_text())
    assert config == json.loads((genai_artifact(kind) / "genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] is True
    for name in (*NAMES, "base"):
        found = by_genai(model, PROMPTS[:2], choose(name))
        assert found == [by_transformers(kind, prompt, name) for prompt in PROMPTS[:2]]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3", "mistral", "hunyuan"])
def test_prompts_of_different_lengths_are_right_in_one_batch(kind, packaged, by_transformers):
    directory = packaged(kind)
    model = og.Model(str(directory))

    found = by_genai(model, PROMPTS, switching(model, directory)("one"))

    assert found == [by_transformers(kind, prompt, "one") for prompt in PROMPTS]


def test_convolutions_read_padding_as_tokens(packaged, by_transformers):
    """The day this fails, docs/command-line.md may stop to warn of it."""
    found = by_genai(og.Model(str(packaged("lfm2"))), PROMPTS)

    right = [by_transformers("lfm2", prompt, "base") for prompt in PROMPTS]
    assert [one == other for one, other in zip(found, right, strict=True)] == [True, True, False]


def test_package_of_a_bank_has_its_rows_as_an_array_and_the_ids(packaged, by_transformers):
    directory = packaged("llama", "bank")
    model = og.Model(str(directory))
    bank = np.load(directory / "propulsion_bank.npy")
    told = json.loads((directory / "adapters.json").read_text())
    ids = np.array([told[name]["id"] for name in NAMES])

    found = by_genai(model, PROMPTS, banked(bank, ids))

    pairs = zip(PROMPTS, NAMES, strict=True)
    assert found == [by_transformers("llama", prompt, name) for prompt, name in pairs]


def test_bank_of_the_other_exporter_is_packaged_too(exported, tmp_path):
    package(exported("llama", "bank"), tmp_path / "served", layout="genai")
    model = og.Model(str(tmp_path / "served"))
    bank = np.load(tmp_path / "served" / "propulsion_bank.npy")

    found = [by_genai(model, PROMPTS[:1], banked(bank, np.array([row]))) for row in range(3)]

    artifact = tmp_path / "served"
    assert len({tuple(tokens) for (tokens,) in found}) == 3
    assert predict(artifact, text=["ba be"], adapter=["one"], max_new_tokens=4)


@pytest.mark.parametrize("mode", ["switchable", "bank"])
def test_package_is_an_artifact_that_runs(mode, packaged, genai_artifact):
    asked = {"text": ["ba be", "fol for got"], "adapter": ["one", "two"], "max_new_tokens": 8}

    assert predict(packaged("llama", mode), **asked) == predict(
        genai_artifact("llama", mode), **asked
    )


@pytest.mark.parametrize("mode", ["switchable", "bank"])
def test_adapters_of_a_package_do_not_change(mode, packaged, genai_world, tmp_path):
    directory = shutil.copytree(packaged("llama", mode), tmp_path / "package")

    with pytest.raises(ArtifactError, match="is a package for ONNX Runtime"):
        add_adapter(directory, f"three={genai_world('llama').one}")


# Adapters of the artifact change without a trace


@pytest.mark.parametrize("mode", ["switchable", "bank"])
def test_adapters_are_added_and_removed(mode, genai_artifact, genai_world, tmp_path):
    directory = shutil.copytree(genai_artifact("llama", mode), tmp_path / "artifact")
    graph = (directory / "model.onnx").stat().st_mtime_ns
    asked = {"text": ["ba be"], "max_new_tokens": 8}
    before = predict(directory, adapter=["two"], **asked)[0]["generated"]

    remove_adapter(directory, "two")
    add_adapter(directory, f"three={genai_world('llama').two}")

    assert sorted(Artifact.read(directory).list_adapters()) == ["one", "three"]
    assert predict(directory, adapter=["three"], **asked)[0]["generated"] == before
    assert predict(directory, adapter=["one"], **asked)[0]["generated"] != before
    assert (directory / "model.onnx").stat().st_mtime_ns == graph
    if mode == "bank":
        assert compact_bank(directory) > 0
        assert predict(directory, adapter=["three"], **asked)[0]["generated"] == before


# What other commands say


def run_command(*arguments):
    with pytest.raises(SystemExit) as done:
        main([*map(str, arguments)])
    return done.value.code


def one_line(capsys):
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_an_engine_is_refused_with_the_way_out(genai_artifact, tmp_path, capsys):
    code = run_command("trt", genai_artifact("llama"), "-o", tmp_path / "engine")

    assert code == 4
    told = one_line(capsys)
    assert "graph of onnxruntime-genai's builder" in told
    assert told.endswith("Export with --exporter transformers.")
    assert not (tmp_path / "engine").exists()


def test_triton_is_refused_with_the_way_out(genai_artifact, tmp_path):
    with pytest.raises(UsageError, match=r"is for text-generation, .* with --layout genai"):
        package(genai_artifact("llama", "bank"), tmp_path / "triton", layout="triton")


@pytest.mark.parametrize("provider", ["cuda", "dml", "webgpu"])
@pytest.mark.parametrize("command", ["run", "parity"])
def test_a_graph_for_a_provider_that_is_not_here_cannot_run(
    command, provider, genai_artifact, tmp_path, capsys
):
    import onnxruntime

    name = {"cuda": "CUDA", "dml": "Dml", "webgpu": "WebGpu"}[provider] + "ExecutionProvider"
    if name in onnxruntime.get_available_providers():
        pytest.skip(f"{name} is here")
    directory = shutil.copytree(genai_artifact("llama"), tmp_path / "artifact")
    artifact = Artifact.read(directory)
    artifact.with_manifest(replace(artifact.manifest, execution_provider=provider))
    options = ["--text", "ba be"] if command == "run" else []

    assert run_command(command, directory, *options) == 3
    told = capsys.readouterr()
    assert f"ONNX Runtime here has no {name}" in told.err + told.out


def test_the_reference_evaluator_is_not_offered(genai_artifact):
    with pytest.raises(UsageError, match=r"cannot run onnx artifacts of onnxruntime-genai's"):
        predict(genai_artifact("llama"), text=["ba be"], runner="reference")


def test_inspect_names_exporter_provider_and_quantisation(genai_artifact, capsys):
    assert run_command("inspect", genai_artifact("llama")) == 0

    told = capsys.readouterr().out.splitlines()
    assert {"exporter: genai", "execution_provider: cpu", "quantization: null"} <= set(told)


def test_artifact_without_the_configuration_of_the_runtime_is_refused(genai_artifact, tmp_path):
    directory = shutil.copytree(genai_artifact("llama"), tmp_path / "artifact")
    manifest = Artifact.read(directory).manifest
    (directory / "genai_config.json").unlink()
    Artifact.write(directory, manifest)

    with pytest.raises(ArtifactError, match=r"genai_config\.json"):
        predict(directory, text=["ba be"])
