import json
import shutil
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.errors import AdapterError, BaseModelError, UsageError
from propulsion_export.graph.optimise import optimise
from propulsion_export.graph.passes.dimensions import NameDimensions
from propulsion_export.graph.sample_inputs import input_names, trace_inputs
from propulsion_export.graph.trace import trace
from propulsion_export.parity.inputs import parity_inputs
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import check_parity
from propulsion_export.runners.onnxruntime import onnxruntime_runner


def base_with_head(world, adapter):
    model = AutoModelForSequenceClassification.from_pretrained(
        world.base, num_labels=len(adapter.labels)
    ).eval()
    model.load_state_dict(
        {name: torch.from_numpy(values) for name, values in adapter.modules.items()}, strict=False
    )
    return model


def inputs_for(model):
    return parity_inputs(input_names(type(model), model.config), model.config, seed=3)[0]


def test_folded_graph_has_the_node_count_of_the_base_export(world, folded):
    model = base_with_head(world, Adapter.read(world.three))
    names = input_names(type(model), model.config)
    base = trace(model, trace_inputs(names, model.config))
    NameDimensions()(base)
    base = optimise(base)

    exported = ir.load(folded / "model.onnx")

    assert len(list(exported.graph)) == len(list(base.graph))


def test_switchable_graph_without_its_optional_inputs_is_the_base_model(world, switchable):
    model = base_with_head(world, Adapter.read(world.three))
    inputs = inputs_for(model)
    with torch.no_grad():
        expected = model(**{n: torch.from_numpy(v) for n, v in inputs.items()}).logits.numpy()

    logits = onnxruntime_runner(switchable / "model.onnx")(inputs)["logits"]

    # Room for five labels; the base model's default head has three, the rest is padding.
    np.testing.assert_allclose(logits[:, :3], expected, atol=1e-5)
    assert not logits[:, 3:].any()


def test_every_packed_input_is_optional(switchable):
    session = onnxruntime.InferenceSession(switchable / "model.onnx")

    optional = {value.name for value in session.get_overridable_initializers()}

    assert optional == {"propulsion_scales", "propulsion_biases", "propulsion_modules"}
    assert {value.name for value in session.get_inputs()} == {
        "input_ids", "attention_mask", "token_type_ids",
    }  # fmt: skip


def test_manifest_places_every_scale_of_every_adapter(world, switchable):
    layout = Artifact.read(switchable).manifest.layout["propulsion_scales"]

    assert {slot.path for slot in layout} == set(Adapter.read(world.three).scales)
    assert sum(slot.length for slot in layout) == Adapter.read(world.five).size


# A bank of each task is judged besides, in `test_bank_mode.py`.
SLOW_TASKS = [
    ("folded", "token-classification"),
    ("folded", "question-answering"),
    ("switchable", "fill-mask"),
    ("switchable", "feature-extraction"),
]


@pytest.mark.parametrize(
    ("mode", "task"),
    [
        ("folded", "fill-mask"),  # whose head shares the embedding
        ("folded", "feature-extraction"),
        ("switchable", "token-classification"),
        ("switchable", "question-answering"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_TASKS),
    ],
)
def test_every_encoder_task_exports_and_passes(mode, task, exported):
    report = check_parity(exported("bert", mode, task=task))

    assert report.passed, [check.detail for check in report.checks]


@pytest.mark.parametrize("mode", ["folded", "switchable"])
def test_half_precision_exports_pass_at_that_precision(mode, export_world):
    directory = export_world(mode, "float16")

    report = check_parity(directory)

    assert report.passed, [check.detail for check in report.checks]
    assert report.dtype == "float16"
    inputs = Artifact.read(directory).manifest.inputs
    packed = {spec.name: spec.dtype for spec in inputs if spec.optional}
    names = ("propulsion_scales", "propulsion_biases", "propulsion_modules")
    assert packed == (dict.fromkeys(names, "float16") if mode == "switchable" else {})


@pytest.mark.parametrize("mode", ["folded", "switchable"])
def test_bfloat16_exports_pass_in_the_reference_evaluator(mode, export_world):
    report = check_parity(export_world(mode, "bfloat16"))

    assert report.runner == "reference"
    assert report.passed, [check.detail for check in report.checks]


def test_bfloat16_is_not_run_where_no_kernel_is(export_world):
    report = check_parity(export_world("folded", "bfloat16"), runner="onnxruntime")

    assert report.verdict == "not run"
    assert "no bfloat16 kernels" in report.not_run[0].reason


def test_configuration_names_the_labels_and_no_path_of_this_machine(world, folded):
    config = json.loads((folded / "config.json").read_text())

    assert config["id2label"] == {"0": "three-0", "1": "three-1", "2": "three-2"}
    assert str(world.base) not in json.dumps(config)


def test_ia3_adapters_of_peft_export_too(world, tmp_path, tiny_checkpoint):
    import peft

    base = tiny_checkpoint("bert", "text-classification")
    model = AutoModelForSequenceClassification.from_pretrained(base)
    config = peft.IA3Config(
        target_modules=["key", "value", "output.dense"],
        feedforward_modules=["output.dense"],
        task_type="SEQ_CLS",
    )
    model = peft.get_peft_model(model, config).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path / "ia3")
    inputs = inputs_for(model.base_model.model)
    with torch.no_grad():
        expected = model(**{n: torch.from_numpy(v) for n, v in inputs.items()}).logits.numpy()

    for mode in ("folded", "switchable"):
        export_onnx([f"ia3={tmp_path / 'ia3'}"], tmp_path / mode, mode=mode)
        artifact = Artifact.read(tmp_path / mode)
        run = onnxruntime_runner(artifact.path)

        np.testing.assert_allclose(
            run({**inputs, **artifact.feeds("ia3")})["logits"], expected, atol=1e-5
        )
        assert check_parity(tmp_path / mode).passed


def test_an_adapter_of_another_base_is_refused_and_nothing_is_written(world, tmp_path, tiny_model):
    tiny_model("bert", "feature-extraction", seed=9).save_pretrained(tmp_path / "stranger")

    with pytest.raises(BaseModelError, match="is not the base model of adapter three"):
        export_onnx([world.three], tmp_path / "out", model=str(tmp_path / "stranger"))

    assert not (tmp_path / "out").exists()


def test_a_head_that_nobody_trained_is_refused(world, tmp_path, write_adapter):
    adapter = replace(Adapter.read(world.three), modules={}, labels=None)
    write_adapter(adapter, tmp_path / "headless")

    with pytest.raises(BaseModelError, match=r"classifier\.\w+ is neither in the checkpoint nor"):
        export_onnx([tmp_path / "headless"], tmp_path / "out")


def test_an_identity_adapter_is_refused(world, tmp_path, write_adapter):
    adapter = Adapter.read(world.three)
    ones = {path: Scale(np.ones_like(scale.values)) for path, scale in adapter.scales.items()}
    write_adapter(replace(adapter, scales=ones, biases={}, modules={}), tmp_path / "nothing")

    with pytest.raises(AdapterError, match="changes nothing"):
        export_onnx([tmp_path / "nothing"], tmp_path / "out", model=str(world.base))


@pytest.mark.parametrize(
    ("adapters", "options", "message"),
    [
        (["three", "five"], {}, "expected one to fold"),
        ([], {}, "no base model is given"),
        (["base=three"], {"mode": "switchable"}, "cannot be called 'base'"),
        (["three", "three"], {"mode": "switchable"}, "two adapters are called 'three'"),
        (["three"], {"task": "summarization"}, "is not supported, expected one of"),
    ],
)
def test_a_wrong_call_is_told_before_anything_is_loaded(
    adapters, options, message, world, tmp_path
):
    places = {"three": world.three, "five": world.five, "base=three": f"base={world.three}"}

    with pytest.raises(UsageError, match=message):
        export_onnx([places[name] for name in adapters], tmp_path / "out", **options)

    assert not (tmp_path / "out").exists()


def test_scales_that_half_precision_cannot_hold_are_refused_unless_accepted(out_of_range, tmp_path):
    (path, scale), *_ = Adapter.read(out_of_range).scales.items()
    half = {"mode": "switchable", "dtype": "float16"}

    with pytest.raises(UsageError, match=f"{path}: scale 1e\\+05 of channel 4 becomes inf"):
        export_onnx([out_of_range], tmp_path / "out", **half)
    assert not (tmp_path / "out").exists()
    artifact = export_onnx([out_of_range], tmp_path / "out", **half, allow_range=True)

    (slot,) = (s for s in artifact.manifest.layout["propulsion_scales"] if s.path == path)
    packed = artifact.feeds("out-of-range")["propulsion_scales"]
    stored = packed[slot.offset : slot.offset + slot.length]
    assert (stored[4], stored[5]) == (np.inf, np.float16(1e-7))
    assert stored[5] != pytest.approx(scale.values[5], rel=0.1)
    np.testing.assert_array_equal(stored[6:], scale.values[6:].astype(np.float16))


def test_a_graph_with_roberta_s_positions_runs_in_the_reference_evaluator(
    tmp_path, tiny_model, tiny_checkpoint, positive_adapter, write_adapter
):
    base = tiny_checkpoint("roberta", "feature-extraction")
    model = tiny_model("roberta", "feature-extraction")
    adapter = replace(positive_adapter(model, name="one"), base=str(base))
    write_adapter(adapter, tmp_path / "one")

    export_onnx([tmp_path / "one"], tmp_path / "out", dtype="bfloat16", task="feature-extraction")

    assert check_parity(tmp_path / "out").passed


def test_an_export_never_replaces_what_it_is_made_from(world, tmp_path):
    adapter = shutil.copytree(world.three, tmp_path / "three")

    for output in (adapter, world.base):
        with pytest.raises(UsageError, match="an input of this command"):
            export_onnx([world.five, f"a={adapter}"], output, mode="switchable", force=True)

    assert Adapter.read(adapter).digest == Adapter.read(world.three).digest
    assert (world.base / "config.json").is_file()
