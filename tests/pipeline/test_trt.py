from dataclasses import replace

import pytest

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.changing import add_adapter
from propulsion_export.cli import main
from propulsion_export.engine import BuildOptions
from propulsion_export.errors import (
    ArtifactError,
    ToolError,
    UnavailableError,
    UsageError,
)
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.trt import build_engine

TARGETS = ("sm_86", "sm_89", "sm_120")
RTX = BuildOptions(runtime="tensorrt-rtx", targets=TARGETS)
SM89 = replace(RTX, targets=("sm_89",))
# Every pair of an architecture with a mode and with a dtype, the rest of the product is slow.
QUICK = [
    ("llama", "folded", "float16"),
    ("llama", "switchable", "bfloat16"),
    ("gpt2", "switchable", "float16"),
]
MORE = [
    ("llama", "folded", "bfloat16"),
    ("llama", "switchable", "float16"),
    ("gpt2", "folded", "bfloat16"),
    ("gpt2", "folded", "float16"),
    ("gpt2", "switchable", "bfloat16"),
    *(
        (kind, "switchable", "float16")
        for kind in ("gptj", "bloom", "opt", "mistral", "qwen3", "gemma3", "phi3")
    ),
]
PAST = "past_key_values.0.key"
PACKED = {"propulsion_scales", "propulsion_biases", "propulsion_modules"}


@pytest.fixture(scope="session")
def exports(export_world):
    return {
        (mode, dtype): export_world(mode, "keep" if dtype == "float32" else dtype)
        for mode in ("folded", "switchable")
        for dtype in ("float32", "float16")
    }


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("mode", ["folded", "switchable"])
def test_an_engine_builds_for_every_target(mode, dtype, exports, tmp_path):
    artifact = build_engine(exports[mode, dtype], tmp_path / "engine", RTX)

    assert artifact.path.stat().st_size > 1000
    assert artifact.manifest.engine.targets == TARGETS
    read = {spec.name: spec for spec in artifact.manifest.inputs}
    assert PACKED & read.keys() == (PACKED if mode == "switchable" else set())
    assert not any(spec.optional for spec in artifact.manifest.inputs)
    if mode == "switchable":
        assert read["propulsion_scales"].dtype == dtype


def test_an_engine_artifact_has_the_feeds_of_every_adapter_and_of_none(exports, tmp_path):
    artifact = build_engine(exports["switchable", "float32"], tmp_path / "engine", RTX)

    for name in ("three", "five", None):
        assert artifact.feeds(name).keys() == PACKED
    assert (artifact.feeds(None)["propulsion_scales"] == 1).all()


def test_parity_of_an_engine_is_not_run_without_a_gpu(exports, tmp_path, capsys):
    build_engine(exports["folded", "float32"], tmp_path / "engine", RTX)

    with pytest.raises(SystemExit) as exit:
        main(["parity", str(tmp_path / "engine"), "--report", str(tmp_path / "report")])

    assert exit.value.code == 3
    assert "a GPU only" in capsys.readouterr().out
    assert "NOT RUN" in (tmp_path / "report" / "parity.html").read_text()


def test_tensorrt_without_a_gpu_is_exit_3_with_the_reason(exports, tmp_path, capsys):
    source = str(exports["folded", "float32"])

    with pytest.raises(SystemExit) as exit:
        main(["trt", source, "-o", str(tmp_path / "engine"), "--runtime", "tensorrt"])

    assert exit.value.code == 3
    assert "tensorrt" in capsys.readouterr().err
    assert not (tmp_path / "engine").exists()


def test_only_an_onnx_export_becomes_an_engine(world, tmp_path):
    merge(world.three, tmp_path / "merged")

    with pytest.raises(ArtifactError, match="is a merged artifact, expected an ONNX export"):
        build_engine(tmp_path / "merged", tmp_path / "engine", RTX)


def test_the_engine_knows_the_graph_it_was_built_from(exports, tmp_path):
    from propulsion_export.engine import onnx_digest

    source = exports["folded", "float32"]
    artifact = build_engine(source, tmp_path / "engine", RTX)

    assert artifact.manifest.engine.onnx_digest == onnx_digest(Artifact.read(source))


def test_an_engine_never_replaces_the_export_it_is_built_from(exports):
    source = exports["folded", "float32"]
    before = (source / "propulsion.json").read_bytes()

    with pytest.raises(UsageError, match="an input of this command"):
        build_engine(source, source, RTX, force=True)

    assert (source / "propulsion.json").read_bytes() == before


@pytest.fixture(scope="session")
def generative(exported):
    """`generative(kind, mode, dtype)`: the export of a tiny generative model with adapters."""

    def make(kind, mode="folded", dtype="float16"):
        return exported(kind, mode, "keep" if dtype == "float32" else dtype)

    return make


def covers(profile, batch, query, past):
    """Whether an engine of this profile takes such a step."""
    asked = {"input_ids": [batch, query], "attention_mask": [batch, past + query]}
    asked |= {
        name: [batch, shapes["min"][1], past, shapes["min"][3]]
        for name, shapes in profile.items()
        if name.startswith("past_key_values.")
    }
    return all(
        low <= size <= high
        for name, shape in asked.items()
        for low, size, high in zip(profile[name]["min"], shape, profile[name]["max"], strict=True)
    )


@pytest.mark.parametrize(
    ("kind", "mode", "dtype"), [*QUICK, *(pytest.param(*p, marks=pytest.mark.slow) for p in MORE)]
)
def test_a_decoder_becomes_one_engine_for_prefill_and_decoding(
    kind, mode, dtype, generative, tmp_path
):
    source = Artifact.read(generative(kind, mode, dtype))

    built = build_engine(source.directory, tmp_path / "engine", SM89)

    assert built.path.stat().st_size > 10_000
    inputs = {spec.name: spec for spec in built.manifest.inputs}
    assert [replace(spec, optional=False) for spec in source.manifest.inputs] == list(
        inputs.values()
    )
    assert ("propulsion_scales" in inputs) == (mode == "switchable")
    assert {inputs[name].dtype for name in inputs if name.startswith(("past", "prop"))} == {dtype}
    profiles = built.manifest.engine.profiles
    positions = profiles[0]["input_ids"]["max"][1]
    assert positions == (2048 if kind == "bloom" else 160)
    for batch, query, past in [
        (1, positions, 0), (32, 7, 0), (32, 1, 1), (1, 1, positions - 1), (5, 2, 9),
    ]:  # fmt: skip
        assert any(covers(profile, batch, query, past) for profile in profiles)
    assert not any(covers(profile, 33, 1, 0) for profile in profiles)
    assert not any(covers(profile, 1, 1, positions) for profile in profiles)


def test_shapes_of_past_and_prompt_can_be_given_on_the_command_line(generative, tmp_path):
    source, engine = generative("llama"), tmp_path / "engine"

    with pytest.raises(SystemExit) as exit:
        main([
            "trt", str(source), "-o", str(engine), "--runtime", "tensorrt-rtx",
            "--target", "sm_89", "--opt-shapes", f"input_ids:1x1,{PAST}:1x2x40x8",
            "--max-shapes", f"input_ids:4x16,{PAST}:4x2x100x8",
        ])  # fmt: skip

    assert exit.value.code == 0
    (profile,) = Artifact.read(engine).manifest.engine.profiles
    assert profile["input_ids"] == {"min": [1, 1], "opt": [1, 1], "max": [4, 16]}
    assert profile["attention_mask"] == {"min": [1, 1], "opt": [1, 41], "max": [4, 116]}
    assert profile["past_key_values.1.value"] == {
        "min": [1, 2, 0, 8], "opt": [1, 2, 40, 8], "max": [4, 2, 100, 8],
    }  # fmt: skip


def test_a_past_that_must_not_be_empty_is_seen_in_the_manifest(generative, tmp_path):
    options = replace(SM89, min_shapes={PAST: (1, 2, 8, 8)})

    built = build_engine(generative("llama"), tmp_path / "engine", options)

    (profile,) = built.manifest.engine.profiles
    assert covers(profile, 1, 1, 8)
    assert not covers(profile, 1, 1, 0)


def test_shapes_that_contradict_each_other_are_refused_in_one_line(generative, tmp_path, capsys):
    source, engine = str(generative("llama")), tmp_path / "engine"
    shapes = f"input_ids:4x16,attention_mask:4x100,{PAST}:4x2x100x8"

    with pytest.raises(SystemExit) as exit:
        main(["trt", source, "-o", str(engine), "--target", "sm_89", "--max-shapes", shapes])

    told = capsys.readouterr().err.strip()
    assert exit.value.code == 2
    assert "found total_sequence 100, expected 116, past and sequence together" in told
    assert "\n" not in told
    assert not engine.exists()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("mixtral", "MixtralForCausalLM"),
        pytest.param("qwen3-moe", "Qwen3MoeForCausalLM", marks=pytest.mark.slow),
    ],
)
def test_a_mixture_of_experts_is_refused_by_name(kind, name, generative, tmp_path):
    with pytest.raises(UnavailableError, match=rf"{name}: .*mixture of experts.*ONNX Runtime"):
        build_engine(generative(kind, "switchable", "float32"), tmp_path / "engine", SM89)

    assert not (tmp_path / "engine").exists()


def test_without_that_refusal_tensorrt_does_not_say_where(generative, tmp_path, monkeypatch):
    from propulsion_export.engine import builder

    monkeypatch.setattr(builder, "check_operators", lambda graph, name: None)

    with pytest.raises(ToolError, match="Unsupported reduction type"):
        build_engine(generative("mixtral", "switchable", "float32"), tmp_path / "engine", SM89)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("t5", "T5ForConditionalGeneration"),
        pytest.param("bart", "BartForConditionalGeneration", marks=pytest.mark.slow),
    ],
)
def test_an_encoder_decoder_is_refused_by_name(kind, name, generative, tmp_path):
    with pytest.raises(UnavailableError, match=rf"{name}: is exported as 3 graphs.*ONNX Runtime"):
        build_engine(generative(kind, "folded", "float32"), tmp_path / "engine", SM89)

    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_bank_becomes_an_engine_whose_profile_covers_the_number_of_adapters(
    dtype, export_world, tmp_path
):
    bank = export_world("bank", "keep" if dtype == "float32" else dtype)

    artifact = build_engine(bank, tmp_path / "engine", RTX)

    read = {spec.name: spec for spec in artifact.manifest.inputs}
    width = artifact.open_bank().width
    assert read["propulsion_bank"].shape == ("adapters", width)
    assert read["propulsion_bank"].dtype == dtype
    assert read["adapter_ids"].shape == ("batch",)
    (profile,) = artifact.manifest.engine.profiles
    assert profile["propulsion_bank"] == {
        "min": [1, width],
        "opt": [64, width],
        "max": [16384, width],
    }
    assert profile["adapter_ids"] == {"min": [1], "opt": [8], "max": [32]}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_bank_of_a_decoder_becomes_an_engine(kind, generative, tmp_path):
    artifact = build_engine(generative(kind, "bank", "float16"), tmp_path / "engine", SM89)

    profiles = artifact.manifest.engine.profiles
    assert len(profiles) == 3
    assert all(profile["propulsion_bank"]["max"][0] == 16384 for profile in profiles)
    assert {"propulsion_bank", "adapter_ids", PAST} <= {s.name for s in artifact.manifest.inputs}


def test_more_adapters_than_that_can_be_asked_for(banked, tmp_path):
    width = Artifact.read(banked).open_bank().width
    shapes = {"propulsion_bank": (50_000, width)}

    artifact = build_engine(banked, tmp_path / "engine", replace(SM89, max_shapes=shapes))

    (profile,) = artifact.manifest.engine.profiles
    assert profile["propulsion_bank"]["max"] == [50_000, width]


def test_an_engine_of_a_bank_takes_adapters_without_another_build(banked, world, tmp_path):
    build_engine(banked, tmp_path / "engine", SM89)
    before = (tmp_path / "engine" / "model.engine").read_bytes()

    changed = add_adapter(tmp_path / "engine", f"later={world.three}")

    assert sorted(changed.list_adapters()) == ["five", "later", "three"]
    assert (tmp_path / "engine" / "model.engine").read_bytes() == before
    assert sorted(Artifact.read(banked).list_adapters()) == ["five", "three"]


def test_a_bank_that_is_built_in_is_no_input_and_takes_no_further_adapters(banked, world, tmp_path):
    artifact = build_engine(banked, tmp_path / "engine", replace(SM89, bank="constant"))

    names = {spec.name for spec in artifact.manifest.inputs}
    assert "adapter_ids" in names
    assert "propulsion_bank" not in names
    assert "propulsion_bank" not in artifact.manifest.engine.profiles[0]
    assert artifact.open_bank().rows() == Artifact.read(banked).open_bank().rows()
    with pytest.raises(ArtifactError, match="has its adapters built into the engine"):
        add_adapter(tmp_path / "engine", f"later={world.three}")


def test_only_a_bank_can_be_built_in(folded, tmp_path):
    with pytest.raises(UsageError, match="--bank constant: found a folded artifact"):
        build_engine(folded, tmp_path / "engine", replace(SM89, bank="constant"))
