import shutil
from dataclasses import replace

import numpy as np
import pytest

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.changing import add_adapter
from propulsion_export.artifacts.layout import pack, packed_inputs
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.errors import AdapterError, BaseModelError, UsageError
from propulsion_export.parity import drawn
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import check_parity
from propulsion_export.pipeline.run import predict
from propulsion_export.serving.session import Session


@pytest.mark.parametrize("mode", ["switchable", "bank"])
def test_slots_are_judged_with_the_base_model_and_a_random_adapter(export_slots, mode):
    report = check_parity(export_slots(mode))

    assert report.passed
    cases = {(check.case, check.adapter) for check in report.checks}
    assert {("parity", "base"), ("parity", "random"), ("effect", "random")} <= cases
    # A base model without a head of its own has zeros there, which show nothing.
    assert ("parity", "identity") in cases
    assert ("mixed", "all") in cases or mode == "switchable"


@pytest.mark.parametrize("mode", ["switchable", "bank"])
def test_the_random_adapter_catches_slots_that_do_not_act(export_slots, mode, monkeypatch):
    def without_effect(artifact, adapters):
        return drawn_feeds(artifact, [replace(a, scales={}, biases={}) for a in adapters])

    drawn_feeds = drawn.feeds_for_drawn
    monkeypatch.setattr("propulsion_export.pipeline.parity.feeds_for_drawn", without_effect)

    report = check_parity(export_slots(mode))

    failed = {(check.case, check.adapter) for check in report.checks if not check.passed}
    assert ("effect", "random") in failed


def test_another_seed_draws_another_adapter(export_slots):
    artifact = Artifact.read(export_slots("bank"))

    first, same, other = (drawn.draw_adapters(artifact, seed)[0] for seed in (0, 0, 1))

    assert first.digest == same.digest != other.digest


@pytest.mark.parametrize("mode", ["switchable", "bank"])
def test_adapters_added_to_slots_are_those_of_an_export_with_them(
    export_slots, mode, world, tmp_path
):
    directory = tmp_path / mode
    shutil.copytree(export_slots(mode), directory)

    for adapter in (world.three, world.five):
        added = add_adapter(directory, adapter)

    assert check_parity(directory).passed
    layout = added.manifest.layout
    for path in (world.three, world.five):
        own = pack(Adapter.read(path), layout, packed_inputs(added, "base"))
        assert all(np.array_equal(own[n], v) for n, v in packed_inputs(added, path.name).items())
    texts = ["ba be bi", "ca ce"]
    replies = Session(directory)(texts, adapter="five")
    assert [len(reply.labels) for reply in replies] == [5, 5]


def test_an_adapter_without_its_head_is_refused_where_the_base_model_has_none(
    export_slots, world, tmp_path, write_adapter
):
    directory = tmp_path / "bank"
    shutil.copytree(export_slots("bank"), directory)
    headless = replace(Adapter.read(world.three), modules={}, labels=None)
    write_adapter(headless, tmp_path / "headless")

    with pytest.raises(AdapterError, match="has no classifier"):
        add_adapter(directory, tmp_path / "headless")


def test_an_adapter_with_more_labels_than_slots_is_refused(world, tmp_path):
    output = tmp_path / "narrow"
    export_onnx(
        [], output, model=str(world.base), mode="bank", task="text-classification", max_labels=2,
        train_bias=True,
    )  # fmt: skip

    with pytest.raises(AdapterError, match="room for shape"):
        add_adapter(output, world.three)


def test_the_attention_placement_has_slots_for_query_key_and_value_alone(world, tmp_path):
    artifact = export_onnx(
        [], tmp_path / "out", model=str(world.base), mode="switchable", task="feature-extraction",
        placement="attention",
    )  # fmt: skip

    slots = artifact.manifest.layout["propulsion_scales"]
    assert {slot.path.rpartition(".")[2] for slot in slots} == {"query", "key", "value"}
    assert len(slots) == 6


def test_the_base_model_alone_is_exported_folded_judged_and_run(tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint("bert", "text-classification")

    artifact = export_onnx([], tmp_path / "out", model=str(checkpoint))

    assert artifact.manifest.adapters == {}
    report = check_parity(tmp_path / "out")
    assert report.passed
    assert {check.adapter for check in report.checks} == {"base", "all"}
    (told,) = predict(tmp_path / "out", text=["ba be"])
    assert told["adapter"] == "base"
    assert told["label"] in ("no", "yes", "maybe")


def test_a_base_model_exported_alone_differs_from_an_edited_one(tiny_checkpoint, tmp_path):
    from safetensors.numpy import load_file, save_file

    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("bert", "text-classification"), checkpoint)
    export_onnx([], tmp_path / "out", model=str(checkpoint))
    weights = load_file(checkpoint / "model.safetensors")
    weights["classifier.weight"] = weights["classifier.weight"] * 1.01
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})

    assert not check_parity(tmp_path / "out").passed


def test_a_folded_export_of_a_base_model_without_the_head_is_refused(world, tmp_path):
    with pytest.raises(BaseModelError, match="neither in the checkpoint"):
        export_onnx([], tmp_path / "out", model=str(world.base), task="text-classification")

    assert not (tmp_path / "out").exists()


# T5's three graphs with slots are those of its adapters, which are traced on every change.
@pytest.mark.parametrize("kind", ["gpt2", pytest.param("t5", marks=pytest.mark.slow)])
def test_generative_slots_pass_and_take_an_adapter(kind, make_world, tmp_path):
    world = make_world(kind)
    mode = "bank" if kind == "gpt2" else "switchable"
    output = tmp_path / "out"
    export_onnx([], output, model=str(world.base), mode=mode)

    report = check_parity(output)
    added = add_adapter(output, world.one)

    assert report.passed
    assert any(check.adapter == "random" for check in report.checks)
    assert added.manifest.task == world.task


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"mode": "folded", "placement": "all"}, "--placement"),
        ({"mode": "folded", "max_labels": 3}, "--max-labels"),
        ({"mode": "folded", "train_bias": True}, "--train-bias"),
        ({"mode": "bank", "max_labels": 0}, "--max-labels: 0"),
        ({"mode": "bank", "max_labels": 3, "task": "feature-extraction"}, "no head that counts"),
    ],
)
def test_slot_options_that_do_nothing_are_refused_by_name(options, found, world, tmp_path):
    with pytest.raises(UsageError, match=found):
        export_onnx([], tmp_path / "out", model=str(world.base), **options)


def test_a_placement_beside_adapters_is_refused(world, tmp_path):
    with pytest.raises(UsageError, match="--placement: is for slots without adapters"):
        export_onnx([world.three], tmp_path / "out", mode="bank", placement="all")


def test_without_adapters_and_model_the_remedy_is_m(tmp_path):
    with pytest.raises(UsageError, match="-m"):
        export_onnx([], tmp_path / "out", mode="bank")


def test_the_fingerprint_of_slots_is_the_base_models(export_slots, tiny_model):
    recorded = Artifact.read(export_slots("bank")).manifest.base.fingerprint

    assert (
        recorded.difference(fingerprint_of_model(tiny_model("bert", "feature-extraction"))) is None
    )


def test_fewer_labels_than_the_base_models_own_head_are_refused(tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint("bert", "text-classification")

    with pytest.raises(UsageError, match="at least the 3 labels"):
        export_onnx([], tmp_path / "out", model=str(checkpoint), mode="bank", max_labels=2)


def test_slots_for_biases_that_no_module_has_are_refused(tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint("llama", "text-generation")

    with pytest.raises(UsageError, match="--train-bias: no module"):
        export_onnx([], tmp_path / "out", model=str(checkpoint), mode="bank", train_bias=True)


def test_the_seed_of_a_random_adapter_is_in_the_report_beside_inputs(export_slots, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("ba be\n" * 16)

    report = check_parity(export_slots("switchable"), inputs=texts, seed=5)

    assert report.passed
    assert report.seed == 5


def test_a_package_without_adapters_says_how_to_run_it(export_slots, tmp_path):
    from propulsion_export.pipeline.package import package

    made = package(export_slots("switchable"), tmp_path / "package", layout="onnx-adapter")

    assert made.adapters == ()
    assert "--adapter" not in made.next_command
