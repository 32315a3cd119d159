import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnxruntime_genai as og
import pytest
import torch

from propulsion_export.adapter import Adapter
from propulsion_export.artifact import Artifact
from propulsion_export.cli import main
from propulsion_export.errors import UsageError
from propulsion_export.fold.memory import fold_
from propulsion_export.model_fingerprint import fingerprint_of_model
from propulsion_export.pipeline.exporting import export_onnx
from propulsion_export.pipeline.merging import merge
from propulsion_export.pipeline.packaging import package
from propulsion_export.pipeline.predicting import predict
from propulsion_export.pipeline.verifying import check_parity

NEW = 64
# Three lengths, none of them with the padding token 0 or the end token 3.
PROMPTS = (
    (17, 60, 5, 93, 41, 8, 77, 30, 12),
    (50, 9, 28, 66),
    (88, 14, 73, 35, 21, 96),
)
KINDS = ("llama", "gpt2")
MORE_KINDS = ("bloom", "gptj", "opt", "mistral", "qwen3", "gemma3", "phi3", "mixtral", "qwen3-moe")


@pytest.fixture(scope="module")
def served(tmp_path_factory, tiny_model, tiny_checkpoint, positive_adapter, write_adapter):
    """`served(kind)`: a tiny model, adapters one and two, and a package of both, switchable."""
    made = {}

    def make(kind):
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            base, model = tiny_checkpoint(kind, "text-generation"), tiny_model(kind)
            for seed, name in enumerate(("one", "two"), 1):
                adapter = replace(
                    positive_adapter(model, seed, name, task="text-generation"),
                    base=str(base),
                    fingerprint=fingerprint_of_model(model),
                )
                write_adapter(adapter, root / name)
            export_onnx([root / "one", root / "two"], root / "onnx", mode="switchable")
            package(root / "onnx", root / "served", layout="genai")
            made[kind] = SimpleNamespace(kind=kind, root=root, directory=root / "served")
        return made[kind]

    return make


@pytest.fixture(scope="module")
def by_transformers(tiny_model, served):
    """`by_transformers(kind, name)`: the tokens that a merged model generates behind PROMPTS."""

    def generate(kind, name):
        model = tiny_model(kind)
        if name is not None:
            fold_(model, Adapter.read(served(kind).root / name), dtype=torch.float32, untie=True)
        return [_generate(model, prompt) for prompt in PROMPTS]

    return generate


def _generate(model, prompt):
    tokens = torch.tensor([prompt])
    found = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
    )
    return found[0, len(prompt) :].tolist()


def by_genai(model, prompts, adapters=None, name=None):
    """The tokens that onnxruntime-genai generates for one batch, padded on the right as it wants.

    The end token is held back until NEW tokens are there, as in `_generate`.
    """
    longest = max(map(len, prompts))
    params = og.GeneratorParams(model)
    length = longest + NEW
    params.set_search_options(batch_size=len(prompts), max_length=length, min_length=length)
    generator = og.Generator(model, params)
    if name is not None:
        generator.set_active_adapter(adapters, name)
    padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
    generator.append_tokens(np.array(padded, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [generator.get_sequence(row)[longest:].tolist() for row in range(len(prompts))]


@pytest.mark.parametrize(
    "kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE_KINDS)]
)
def test_genai_generates_what_transformers_does_and_switches_adapters(
    kind, served, by_transformers
):
    directory = served(kind).directory
    model = og.Model(str(directory))  # once: adapters are switched without loading it again
    adapters = og.Adapters(model)
    for name in ("one", "two"):
        adapters.load(str(directory / "adapters" / f"{name}.onnx_adapter"), name)
    expected = {name: by_transformers(kind, name) for name in (None, "one", "two")}

    for name in (None, "one", "two", None):
        alone = [by_genai(model, [prompt], adapters, name)[0] for prompt in PROMPTS]
        assert alone == expected[name], name
    # Padding stands between a prompt and its answer, so a sliding window would see less of it.
    together = {name: by_genai(model, PROMPTS, adapters, name) for name in expected}

    assert (together == expected) == (kind != "mistral")
    # The twin: another adapter would have been noticed.
    assert expected[None] != expected["one"] != expected["two"] != expected[None]


def test_a_folded_package_generates_the_adapted_models_tokens(served, by_transformers, tmp_path):
    export_onnx([served("llama").root / "one"], tmp_path / "onnx")
    package(tmp_path / "onnx", tmp_path / "served", layout="genai")

    found = by_genai(og.Model(str(tmp_path / "served")), PROMPTS)

    assert found == by_transformers("llama", "one")
    assert list((tmp_path / "served").rglob("*.onnx_adapter")) == []


def test_half_precision_is_served_too(served, tmp_path):
    export_onnx([served("llama").root / "one"], tmp_path / "onnx", dtype="float16")
    package(tmp_path / "onnx", tmp_path / "served", layout="genai")
    model = og.Model(str(tmp_path / "served"))

    [tokens] = by_genai(model, PROMPTS[:1])

    assert len(set(tokens)) > 3


def test_a_text_ends_where_the_generation_config_says(served, by_transformers, tmp_path):
    base = shutil.copytree(
        json.loads((served("llama").root / "one/adapter_config.json").read_text())[
            "base_model_name_or_path"
        ],
        tmp_path / "base",
    )
    tokens = by_transformers("llama", "one")[0]
    last = max(tokens, key=tokens.index)  # the one that comes last for the first time
    ends = {"eos_token_id": [98, last], "bos_token_id": 2}
    (base / "generation_config.json").write_text(json.dumps(ends))
    export_onnx([served("llama").root / "one"], tmp_path / "onnx", model=str(base))
    package(tmp_path / "onnx", tmp_path / "served", layout="genai")
    model = og.Model(str(tmp_path / "served"))
    params = og.GeneratorParams(model)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([PROMPTS[0]], np.int32))

    while not generator.is_done():
        generator.generate_next_token()

    found = generator.get_sequence(0)[len(PROMPTS[0]) :].tolist()
    assert found == tokens[: tokens.index(last)]
    assert len(found) > 8


def test_a_package_is_an_artifact_that_runs_and_is_judged_like_its_export(served):
    world = served("llama")

    report = check_parity(world.directory)
    told = [
        predict(directory, text=["ba be"], adapter=["two"], max_new_tokens=8)
        for directory in (world.directory, world.root / "onnx")
    ]

    assert report.passed
    assert told[0] == told[1]


def test_it_holds_all_that_the_server_reads_and_can_be_moved(served, tmp_path):
    world = served("llama")

    moved = shutil.copytree(world.directory, tmp_path / "elsewhere")

    names = {file.relative_to(moved).as_posix() for file in moved.rglob("*") if file.is_file()}
    assert names >= {
        "model.onnx",
        "genai_config.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "adapters/one.onnx_adapter",
        "adapters/two.onnx_adapter",
    }
    assert not any(file.is_symlink() for file in moved.rglob("*"))
    assert og.Model(str(moved))
    assert Artifact.read(moved).manifest == Artifact.read(world.directory).manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "feature-extraction"}, "is for feature-extraction, expected text-generation"),
        ({"dtype": "bfloat16"}, r"bfloat16, .* Export with --dtype float32 or float16"),
    ],
)
def test_what_the_server_cannot_run_is_refused_by_name(change, message, served, tmp_path):
    directory = shutil.copytree(served("llama").root / "onnx", tmp_path / "onnx")
    artifact = Artifact.read(directory)
    artifact.with_manifest(replace(artifact.manifest, **change))

    with pytest.raises(UsageError, match=message):
        package(directory, tmp_path / "served", layout="genai")
    assert not (tmp_path / "served").exists()


def test_a_merged_checkpoint_is_refused(served, tmp_path):
    merge(served("llama").root / "one", tmp_path / "merged")

    with pytest.raises(UsageError, match=r"is of kind merged, expected an ONNX export"):
        package(tmp_path / "merged", tmp_path / "served", layout="genai")


def test_the_export_is_not_written_over_even_by_force(served):
    directory = served("llama").root / "onnx"

    with pytest.raises(UsageError, match="is an input of this command"):
        package(directory, directory, layout="genai", force=True)


def test_nothing_is_left_when_it_fails_on_the_way(served, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("on the way")

    monkeypatch.setattr("propulsion_export.pipeline.packaging.write_onnx_adapter", fail)

    with pytest.raises(RuntimeError, match="on the way"):
        package(served("llama").root / "onnx", tmp_path / "served", layout="genai")
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_where_it_is_and_how_large(served, tmp_path, capsys):
    arguments = [str(served("llama").root / "onnx"), "-o", str(tmp_path / "served")]

    with pytest.raises(SystemExit) as done:
        main(["package", *arguments, "--layout", "genai", "--json"])

    assert done.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["adapters"] == ["one", "two"]
    assert told["bytes"] > 100_000
    assert (tmp_path / "served" / "genai_config.json").is_file()
