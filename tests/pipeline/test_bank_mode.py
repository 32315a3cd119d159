"""One graph for any number of adapters: every architecture and task, a thousand adapters.

A bank is judged in three ways: by the verdict, which asks PyTorch of every adapter; with a thousand
random rows, each beside others and again beside others still, bit for bit; and with a thousand
random adapters against PyTorch.
"""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification

from kinds import DECODERS, ENCODER_DECODERS, EXPERTS
from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.bank import Bank
from propulsion_export.artifacts.changing import add_adapter, remove_adapter
from propulsion_export.artifacts.layout import (
    pack,
    packed_inputs,
    to_row,
    width_of,
)
from propulsion_export.artifacts.manifest import read_manifest
from propulsion_export.artifacts.tensor_names import BANK_INPUT, IDS_INPUT
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.errors import (
    AdapterError,
    ArtifactError,
    BaseModelError,
    UnknownAdapterError,
    UsageError,
)
from propulsion_export.parity.comparison import FACTOR
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import check_parity
from propulsion_export.runners.decoding import recomputing
from propulsion_export.runners.opening import choose_runner, open_candidate
from propulsion_export.runners.pytorch import torch_runner
from propulsion_export.scaling.attach import attached
from propulsion_export.serving.session import Session

ENCODERS = ("bert", "roberta", "distilbert", "electra", "deberta-v2", "albert", "mpnet")
TASKS = ("token-classification", "question-answering", "fill-mask", "feature-extraction")
ADAPTERS, ROWS, LENGTH = 1000, 40, 6
LABELS = ("no", "yes", "maybe")  # of the checkpoint
# Each other one is traced in ten seconds, through code that these go through: absolute, relative
# and rotary positions, layers that are shared, one matrix for several projections, experts.
QUICK = (
    "bert",
    "deberta-v2",
    "albert",
    "gpt2",
    "llama",
    "bloom",
    "phi3",
    "gemma3",
    "mixtral",
    "t5",
)
CASES = [
    pytest.param(kind, task, marks=() if kind in QUICK else pytest.mark.slow)
    for kind, task in (
        *((kind, "text-classification") for kind in ENCODERS),
        *(("bert", task) for task in TASKS),
        *((kind, "text-generation") for kind in DECODERS),
        *((kind, "text2text-generation") for kind in ENCODER_DECODERS),
    )
]


@pytest.fixture(scope="session")
def build_bank(make_world, exported):
    """`build_bank(kind, task)`: a bank of two adapters, with their directories and the model."""

    def make(kind, task):
        world = make_world(kind, task, experts=kind not in EXPERTS)
        bank = exported(kind, "bank", task=task)
        return SimpleNamespace(bank=bank, model=world.model, one=world.one, two=world.two)

    return make


def runner_of(directory):
    """The bank as a runner of whole sequences, which the verdict steps through besides."""
    artifact = Artifact.read(directory)
    run = open_candidate(artifact, choose_runner(artifact, "auto"))
    return artifact, run if callable(run) else recomputing(run)


def inputs_of(artifact, seed=0):
    """A batch of random tokens, padded on the left for a decoder, else on the right."""
    chooser = np.random.default_rng(seed)
    shape = (ROWS, LENGTH)
    lengths = chooser.integers(3, LENGTH + 1, ROWS)[:, None]
    mask = (np.arange(LENGTH) < lengths).astype(np.int64)
    if artifact.manifest.task == "text-generation":
        mask = mask[:, ::-1].copy()
    inputs = {
        "input_ids": np.where(mask == 1, chooser.integers(5, 99, shape), 0),
        "attention_mask": mask,
    }
    if artifact.manifest.task == "text2text-generation":
        inputs["decoder_input_ids"] = chooser.integers(5, 99, shape)
    elif any(spec.name == "token_type_ids" for spec in artifact.manifest.inputs):
        inputs["token_type_ids"] = np.zeros_like(mask)
    return inputs


def random_bank(artifact, seed=0):
    """The base model's row, and a thousand like it, each number off by up to a half."""
    base = to_row(packed_inputs(artifact, BASE_NAME), artifact.manifest.layout)
    factors = np.random.default_rng(seed).uniform(0.5, 1.5, (ADAPTERS + 1, base.size))
    factors[0] = 1
    return (base * factors).astype(np.float32)


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_the_verdict_passes(kind, task, build_bank):
    made = build_bank(kind, task)

    report = check_parity(made.bank)

    assert report.passed, "\n".join(c.detail for c in report.checks if not c.passed)
    mixed = next(check for check in report.checks if check.case == "mixed")
    assert "; bit for bit" in mixed.detail
    assert {check.adapter for check in report.checks if check.case == "parity"} == {
        "one",
        "two",
        "base",
    }


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_rows_of_a_thousand_adapters_are_bit_for_bit_the_same_beside_any_others(
    kind, task, build_bank
):
    artifact, run = runner_of(build_bank(kind, task).bank)
    inputs, bank = inputs_of(artifact), random_bank(artifact)
    chooser = np.random.default_rng(1)
    ids = chooser.permutation(ADAPTERS) + 1
    even = np.arange(ROWS) % 2 == 0

    for start in range(0, ADAPTERS, ROWS):
        part = ids[start : start + ROWS]
        mixed = run({**inputs, BANK_INPUT: bank, IDS_INPUT: part})
        for kept in (even, ~even):
            others = np.where(kept, part, (part + chooser.integers(1, 500)) % ADAPTERS)
            beside = run({**inputs, BANK_INPUT: bank, IDS_INPUT: others})
            for name, values in mixed.items():
                np.testing.assert_array_equal(values[kept], beside[name][kept])
                assert not any(map(np.array_equal, values[~kept], beside[name][~kept]))

    # And of the last ones, what each is in a batch of its own adapter.
    for row, adapter in enumerate(part):
        own = run({**inputs, BANK_INPUT: bank, IDS_INPUT: np.array([adapter])})
        for name, values in mixed.items():
            np.testing.assert_array_equal(values[row], own[name][row])


def test_a_thousand_adapters_are_what_pytorch_computes_of_each_alone(build_bank, random_adapter):
    made = build_bank("bert", "text-classification")
    artifact, run = runner_of(made.bank)
    inputs = inputs_of(artifact)
    layout, base = artifact.manifest.layout, packed_inputs(artifact, BASE_NAME)
    adapters = [
        random_adapter(made.model, seed, f"a{seed}", biases=True, head=True)
        for seed in range(ADAPTERS)
    ]
    bank = np.stack([to_row(pack(adapter, layout, base), layout) for adapter in adapters])
    found = np.concatenate(
        [
            run({**inputs, BANK_INPUT: bank, IDS_INPUT: np.arange(start, start + ROWS)})["logits"]
            for start in range(0, ADAPTERS, ROWS)
        ]
    )
    own = alone_in_torch(made.model.float(), adapters[:ROWS], inputs)
    oracle = alone_in_torch(made.model.double(), adapters, inputs)
    made.model.float()

    allowed = FACTOR * np.abs(own - oracle[:ROWS]).max()
    assert np.abs(found - oracle).max() <= allowed
    assert np.abs(np.roll(found, 1, axis=0) - oracle).max() > 1e4 * allowed


def alone_in_torch(model, adapters, inputs):
    """Logits of each adapter for a row of its own, without padding."""
    logits = []
    for number, adapter in enumerate(adapters):
        row = number % ROWS
        real = inputs["attention_mask"][row] == 1
        one = {name: values[row : row + 1, real] for name, values in inputs.items()}
        with attached(model, adapter):
            logits.append(torch_runner(model)(one)["logits"])
    return np.concatenate(logits)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_the_graph_has_the_two_inputs_of_the_contract(kind, build_bank):
    task = {"bert": "text-classification", "llama": "text-generation"}
    artifact = Artifact.read(build_bank(kind, task.get(kind, "text2text-generation")).bank)
    manifest = artifact.manifest
    graphs = manifest.graphs.values() if manifest.graphs else [manifest]

    for graph in graphs:
        specs = {spec.name: spec for spec in graph.inputs}
        width = width_of(manifest.layout)
        assert specs[BANK_INPUT].shape == ("adapters", width)
        assert specs[IDS_INPUT].shape == ("batch",)
        assert specs[IDS_INPUT].dtype == "int64"
        assert not any(name.startswith("propulsion_rows") for name in specs)


def copied(directory, tmp_path):
    return shutil.copytree(directory, tmp_path / "bank")


def test_an_adapter_is_added_later_without_a_new_trace(banked, world, tmp_path):
    directory = copied(banked, tmp_path)
    graph = (directory / "model.onnx").read_bytes()

    add_adapter(directory, f"later={world.three}")

    assert (directory / "model.onnx").read_bytes() == graph
    assert sorted(Artifact.read(directory).list_adapters()) == ["five", "later", "three"]
    report = check_parity(directory)
    assert report.passed
    assert "later" in {check.adapter for check in report.checks if check.case == "effect"}


def test_adapters_are_removed_down_to_the_base_model(banked, tmp_path):
    directory = copied(banked, tmp_path)

    remove_adapter(directory, "three")
    assert list(Artifact.read(directory).list_adapters()) == ["five"]
    remove_adapter(directory, "five")

    assert Artifact.read(directory).list_adapters() == {}
    with pytest.raises(UnknownAdapterError, match="no adapter 'five'"):
        remove_adapter(directory, "five")
    with pytest.raises(UnknownAdapterError, match="no adapter 'three'"):
        Artifact.read(directory).feeds("three")


def test_replacing_an_adapter_needs_force_and_changes_what_is_computed(banked, world, tmp_path):
    directory = copied(banked, tmp_path)
    before = packed_inputs(Artifact.read(directory), "three")
    with pytest.raises(UsageError, match="has an adapter 'three' already"):
        add_adapter(directory, f"three={world.five}")

    add_adapter(directory, f"three={world.five}", force=True)

    after = packed_inputs(Artifact.read(directory), "three")
    assert not np.array_equal(before["propulsion_scales"], after["propulsion_scales"])
    entry = Artifact.read(directory).list_adapters()["three"]
    assert entry.labels == tuple(f"five-{i}" for i in range(5))


def test_an_adapter_that_has_no_room_is_refused(banked, world, tmp_path):
    directory = copied(banked, tmp_path)
    three = Adapter.read(world.three)
    (tmp_path / "wide").mkdir()
    head = {"classifier.weight": np.ones((9, 32)), "classifier.bias": np.ones(9)}
    wide = replace(three, modules={name: np.float32(v) for name, v in head.items()}, labels=None)
    wide.write(tmp_path / "wide")

    with pytest.raises(AdapterError, match=r"classifier.weight has shape \[9, 32\], the artifact"):
        add_adapter(directory, tmp_path / "wide")

    assert sorted(Artifact.read(directory).list_adapters()) == ["five", "three"]


def test_an_adapter_of_another_base_model_is_refused(banked, world, tiny_model, tmp_path):
    directory = copied(banked, tmp_path)
    stranger = fingerprint_of_model(tiny_model("bert", seed=9))
    (tmp_path / "stranger").mkdir()
    replace(Adapter.read(world.three), fingerprint=stranger).write(tmp_path / "stranger")

    with pytest.raises(BaseModelError, match="is not the base model of adapter stranger") as told:
        add_adapter(directory, tmp_path / "stranger")
    assert " -m" not in str(told.value)  # which `adapter add` has not

    assert sorted(Artifact.read(directory).list_adapters()) == ["five", "three"]


@pytest.mark.parametrize("mistake", ["swapped", "moved"])
def test_a_planted_mistake_fails(mistake, banked, tmp_path):
    """Rows that are each other's, and a row whose scales lie one channel off."""
    directory = copied(banked, tmp_path)
    artifact = Artifact.read(directory)
    rows, values = artifact.open_bank().rows(), np.array(artifact.open_bank().values())
    three, five = values[rows["three"].number], values[rows["five"].number]
    planted = {
        "swapped": {"three": five, "five": three},
        "moved": {"three": np.roll(three, 1), "five": five},
    }
    shutil.rmtree(directory / "adapters")
    bank = Bank.create(directory, values[0])
    for name, row in planted[mistake].items():
        bank.add(name, row, rows[name].entry)

    report = check_parity(directory)

    assert not report.passed
    failed = {check.case for check in report.checks if not check.passed}
    assert {"parity", "mixed"} <= failed


def test_a_damaged_row_is_found(banked, tmp_path):
    directory = copied(banked, tmp_path)
    bank = Artifact.read(directory).open_bank()
    row = bank.rows()["three"]
    with bank.find_file().open("r+b") as file:
        file.seek(row.number * bank.width * 4 + 40)
        file.write(b"\x00\x00\x80\x7f")

    with pytest.raises(ArtifactError, match=rf"row {row.number} is sha256"):
        Artifact.read(directory).feeds("three")
    assert Artifact.read(directory).feeds("five")[IDS_INPUT] == bank.rows()["five"].number


def test_what_a_row_cannot_have_is_refused_and_nothing_is_left(
    tiny_checkpoint, tiny_model, positive_adapter, write_adapter, tmp_path
):
    base, model = tiny_checkpoint("mixtral", "text-generation"), tiny_model("mixtral")
    made = positive_adapter(model, 1, "one", task="text-generation")
    made = replace(made, base=str(base), fingerprint=fingerprint_of_model(model))
    adapter = write_adapter(made, tmp_path / "one")

    with pytest.raises(UsageError, match=r"experts\.gate_up_proj: scales experts"):
        export_onnx([adapter], tmp_path / "bank", mode="bank")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


def test_the_adapters_of_a_bank_stand_in_its_registry_alone(banked):
    manifest = read_manifest(banked / "propulsion.json")

    assert manifest.mode == "bank"
    assert manifest.adapters == {}
    assert not any(name.startswith("adapters/") for name in manifest.files)


def test_of_many_adapters_a_verdict_judges_a_sample_and_says_so(banked, world, tmp_path):
    directory = copied(banked, tmp_path)
    for number in range(20):
        add_adapter(directory, f"copy{number}={world.three if number % 2 else world.five}")

    report = check_parity(directory, adapter=[f"copy7={world.three}"])

    assert report.passed
    sample = next(check for check in report.checks if check.case == "sample")
    assert "16 of 22 adapters are judged, chosen with seed 0" in sample.detail
    judged = {check.adapter for check in report.checks if check.case == "parity"}
    assert len(judged) == 17
    assert {"copy7", "base"} <= judged


def test_a_class_of_anothers_head_never_wins_for_an_adapter_without_label_names(
    banked, world, write_adapter, tmp_path
):
    """Its logits may all be below the zero that fills the room of the larger head."""
    directory = copied(banked, tmp_path)
    three = Adapter.read(world.three)
    low = dict(three.modules) | {"classifier.bias": np.full(3, -100, np.float32)}
    (tmp_path / "nameless").mkdir()
    replace(three, modules=low, labels=None).write(tmp_path / "nameless")

    add_adapter(directory, tmp_path / "nameless")

    export_onnx([tmp_path / "nameless", world.five], tmp_path / "first", mode="bank")
    (base,) = Session(tmp_path / "first")("ba ce")  # whose head is the first adapter's
    assert base.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert base.prediction["label"] in base.labels
    (reply,) = Session(directory)("ba ce", adapter="nameless")
    assert reply.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert reply.outputs["logits"].max() < -50
    assert reply.prediction["label"] in reply.labels


def test_an_adapter_without_a_head_does_not_get_anothers(banked, world, tmp_path):
    directory = copied(banked, tmp_path)
    (tmp_path / "headless").mkdir()
    replace(Adapter.read(world.three), modules={}, labels=None).write(tmp_path / "headless")

    with pytest.raises(AdapterError, match=r"has no classifier.weight, nor has the base model"):
        add_adapter(directory, tmp_path / "headless")

    assert sorted(Artifact.read(directory).list_adapters()) == ["five", "three"]


def test_an_adapter_without_a_head_has_the_checkpoints_own(build_bank, tmp_path):
    made = build_bank("bert", "text-classification")
    directory = copied(made.bank, tmp_path)
    (tmp_path / "headless").mkdir()
    one = Adapter.read(made.one)
    replace(one, modules={}, labels=None).write(tmp_path / "headless")

    add_adapter(directory, tmp_path / "headless")

    feeds = packed_inputs(Artifact.read(directory), "headless")
    base = packed_inputs(Artifact.read(directory), BASE_NAME)
    np.testing.assert_array_equal(feeds["propulsion_modules"], base["propulsion_modules"])
    assert Artifact.read(directory).list_adapters()["headless"].labels == LABELS
    assert check_parity(directory).passed


@pytest.mark.parametrize("mode", ["merged", "folded", "switchable", "bank"])
def test_classes_of_the_checkpoints_head_have_its_names(mode, build_bank, tmp_path):
    one = Adapter.read(build_bank("bert", "text-classification").one)
    (tmp_path / "headless").mkdir()
    replace(one, modules={}, labels=None).write(tmp_path / "headless")

    if mode == "merged":
        merge(tmp_path / "headless", tmp_path / "out")
    else:
        export_onnx([tmp_path / "headless"], tmp_path / "out", mode=mode)

    (reply,) = Session(tmp_path / "out")("ba ce", adapter="headless")
    assert reply.labels == LABELS
    assert reply.prediction["label"] in LABELS
    assert check_parity(tmp_path / "out").passed


@pytest.mark.parametrize("width", [2, 5])  # narrower and wider than the checkpoint's own head
@pytest.mark.parametrize("mode", ["bank", "switchable"])
def test_the_base_model_keeps_its_own_head_beside_adapters_of_another_width(
    mode, width, build_bank, tiny_model, positive_adapter, write_adapter, tmp_path
):
    made = build_bank("bert", "text-classification")
    headless = replace(Adapter.read(made.one), modules={}, labels=None)
    other = positive_adapter(
        tiny_model("bert", num_labels=width, id2label=None, label2id=None), 3, "other",
        head=True, task="text-classification", labels=tuple(f"o{n}" for n in range(width)),
    )  # fmt: skip
    write_adapter(
        replace(other, base=headless.base, fingerprint=headless.fingerprint), tmp_path / "other"
    )
    (tmp_path / "headless").mkdir()
    headless.write(tmp_path / "headless")

    export_onnx([tmp_path / "other", tmp_path / "headless"], tmp_path / "out", mode=mode)

    assert check_parity(tmp_path / "out").passed
    tokens = np.array([[5, 9, 42, 17]])
    inputs = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    inputs["token_type_ids"] = np.zeros_like(tokens)
    model = AutoModelForSequenceClassification.from_pretrained(headless.base).eval()
    session = Session(tmp_path / "out")
    for name, adapter in (("base", Adapter("base", {})), ("headless", headless)):
        (reply,) = session(inputs, name)
        with attached(model, adapter):
            expected = torch_runner(model)(inputs)["logits"][0]
        assert reply.labels == LABELS
        np.testing.assert_allclose(reply.outputs["logits"], expected, rtol=1e-4, atol=1e-5)
    assert session(inputs, "other")[0].labels == other.labels


@pytest.mark.parametrize("mode", ["bank", "switchable"])
def test_the_verdict_passes_when_the_widest_head_is_gone(mode, banked, switchable, tmp_path):
    directory = copied(banked if mode == "bank" else switchable, tmp_path)
    remove_adapter(directory, "five")

    assert check_parity(directory).passed
    if mode == "bank":
        remove_adapter(directory, "three")
        assert check_parity(directory).passed


@pytest.mark.parametrize("mode", ["bank", "switchable"])
def test_the_base_model_is_not_removed(mode, banked, switchable, tmp_path):
    directory = copied(banked if mode == "bank" else switchable, tmp_path)

    with pytest.raises(UsageError, match="'base' is the base model, which cannot be removed"):
        remove_adapter(directory, "base")
