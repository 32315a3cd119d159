import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.bank import Bank
from propulsion_export.artifacts.manifest import (
    AdapterEntry,
    BaseEntry,
    EngineEntry,
    Manifest,
    TensorSpec,
)
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.errors import ArtifactError, UsageError
from propulsion_export.graph.passes.built_in_bank import BANK_FILE, BuildInBank
from propulsion_export.packaging.triton import (
    adapters_text,
    rows_in_use,
    write_bank,
)
from propulsion_export.packaging.triton_config import ServedModel, config_text, plan_model

TOKENS = TensorSpec("input_ids", "int64", ("batch", "sequence"))
BANK = TensorSpec("propulsion_bank", "float16", ("adapters", 7))
IDS = TensorSpec("adapter_ids", "int64", ("batch",))
LOGITS = TensorSpec("logits", "float16", ("batch", 5))
BASE = BaseEntry("some/model", Fingerprint("float32", {"weight": (0.5,) * 8}), ("no", "yes"))
PROFILE = {
    "input_ids": {"min": [1, 1], "opt": [8, 128], "max": [16, 512]},
    "adapter_ids": {"min": [1], "opt": [8], "max": [16]},
}
ENGINE = EngineEntry("tensorrt", "10.16", ("sm_89",), (PROFILE,), {}, "sha256:00")
DTYPES = {
    "bool": "TYPE_BOOL",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float32": "TYPE_FP32",
}
BANK_GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
graph (float[batch, 3] x, float[adapters, 3] propulsion_bank, int64[batch] adapter_ids)
    => (float[batch, 3] y) {
    rows = Gather <axis = 0> (propulsion_bank, adapter_ids)
    y = Mul(x, rows)
}
"""


def artifact(**changes):
    """A bank that no disk holds: what is refused is refused before anything is read."""
    manifest = Manifest(
        kind="onnx",
        mode="bank",
        task="text-classification",
        dtype="float16",
        base=BASE,
        adapters={},
        inputs=(TOKENS, BANK, IDS),
        outputs=(LOGITS,),
    )
    return Artifact(Path("export"), replace(manifest, **changes))


def engine(**changes):
    """An engine with its bank inside, which Triton serves."""
    return artifact(
        **{"kind": "engine", "engine": ENGINE, "inputs": (TOKENS, IDS), "outputs": (LOGITS,)}
        | changes
    )


def parsed(model):
    """What Triton's own schema makes of our text; an unknown field is an error."""
    return text_format.Parse(config_text(model), ModelConfig())


# The configuration


def test_the_configuration_says_field_by_field_what_triton_must_know():
    config = parsed(plan_model(artifact(), "topics", None))

    assert config == ModelConfig(
        name="topics",
        backend="onnxruntime",
        default_model_filename="model.onnx",
        max_batch_size=32,
        input=[
            {"name": "input_ids", "data_type": "TYPE_INT64", "dims": [-1]},
            {"name": "adapter_ids", "data_type": "TYPE_INT64", "dims": [1], "reshape": {}},
        ],
        output=[{"name": "logits", "data_type": "TYPE_FP16", "dims": [5]}],
        dynamic_batching={"max_queue_delay_microseconds": 500},
    )
    assert config.input[1].HasField("reshape")
    assert not config.input[0].HasField("reshape")


def test_an_engine_is_told_of_its_backend_and_of_as_many_rows_as_it_takes():
    config = parsed(plan_model(engine(), "topics", None))

    assert (config.backend, config.default_model_filename) == ("tensorrt", "model.plan")
    assert config.max_batch_size == 16
    assert [tensor.name for tensor in config.input] == ["input_ids", "adapter_ids"]
    assert parsed(plan_model(engine(), "topics", 4)).max_batch_size == 4


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    shapes=st.lists(
        st.lists(st.one_of(st.integers(1, 10**6), st.sampled_from(["sequence", "a"])), max_size=3),
        min_size=1,
        max_size=4,
    ),
    dtype=st.sampled_from(sorted(DTYPES)),
    rows=st.integers(1, 2**31 - 1),
)
def test_any_tensors_are_told_as_they_are(shapes, dtype, rows):
    specs = tuple(
        TensorSpec(f"tensor.{number}", dtype, ("batch", *shape))
        for number, shape in enumerate(shapes)
    )

    config = parsed(ServedModel("a", "onnxruntime", "model.onnx", specs, specs, rows))

    assert config.max_batch_size == rows
    for told in (config.input, config.output):
        assert [tensor.name for tensor in told] == [spec.name for spec in specs]
        assert {DataType.Name(tensor.data_type) for tensor in told} == {DTYPES[dtype]}
        for tensor, shape in zip(told, shapes, strict=True):
            sizes = [-1 if isinstance(size, str) else size for size in shape]
            assert list(tensor.dims) == (sizes or [1])
            assert tensor.HasField("reshape") == (not sizes)


def test_a_field_that_triton_does_not_know_would_be_noticed():
    text = config_text(plan_model(artifact(), "topics", None))

    with pytest.raises(text_format.ParseError, match="max_batch_sizes"):
        text_format.Parse(text.replace("max_batch_size", "max_batch_sizes"), ModelConfig())


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec("logits", "float32", ()),
        TensorSpec("logits", "float32", (4, "batch")),
        TensorSpec("logits", "float8", ("batch",)),
    ],
)
def test_a_tensor_that_cannot_be_batched_is_refused_by_name(spec):
    with pytest.raises(UsageError, match=r"logits: found float\d+ .*, expected \[batch, …\]"):
        config_text(plan_model(artifact(outputs=(spec,)), "topics", None))


# What is refused


REFUSED = [
    pytest.param(
        artifact(kind="merged", mode="folded"),
        r"export: is of kind merged, expected an ONNX export or an engine. .*onnx` makes one",
        id="merged",
    ),
    pytest.param(
        artifact(task="text-generation"),
        r"is for text-generation, .* with --layout genai",
        id="generates",
    ),
    pytest.param(
        artifact(task="text2text-generation"),
        r"is for text2text-generation, .* with ONNX Runtime itself",
        id="encoder-decoder",
    ),
    pytest.param(
        artifact(mode="switchable"),
        r"is switchable, which means one adapter for a whole batch, .* with --mode bank",
        id="switchable",
    ),
    pytest.param(
        engine(engine=replace(ENGINE, runtime="tensorrt-rtx")),
        r"is an engine of tensorrt-rtx, expected one of tensorrt: .* --runtime tensorrt",
        id="rtx",
    ),
    pytest.param(
        engine(inputs=(TOKENS, BANK, IDS)),
        r"is an engine that is fed its bank, expected it built in: .* trt --bank constant",
        id="bank-is-input",
    ),
]


@pytest.mark.parametrize(("found", "message"), REFUSED)
def test_what_triton_cannot_serve_is_refused_in_one_line_with_the_way_out(found, message):
    with pytest.raises(UsageError, match=message) as refused:
        plan_model(found, "topics", None)

    assert refused.value.exit_code == 2
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "a b", "ä", 'a"b', "-a"])
def test_a_name_that_is_no_part_of_an_address_is_refused(name):
    with pytest.raises(UsageError, match=r"--model-name: found .*, expected letters, digits"):
        plan_model(artifact(), name, None)


def test_the_name_of_the_packages_own_file_is_refused():
    with pytest.raises(UsageError, match=r"'propulsion.json', which is the package's own file"):
        plan_model(artifact(), "propulsion.json", None)


def test_more_rows_than_an_engine_takes_are_refused():
    with pytest.raises(UsageError, match=r"found 17, expected at most 16, .*--max-shapes"):
        plan_model(engine(), "topics", 17)


def test_an_engine_that_takes_no_single_row_is_refused():
    profile = PROFILE | {"adapter_ids": {"min": [4], "opt": [8], "max": [16]}}
    found = engine(engine=replace(ENGINE, profiles=(profile,)))

    with pytest.raises(UsageError, match=r"takes 4 rows or more, expected 1.*--min-shapes"):
        plan_model(found, "topics", None)


def test_no_rows_are_refused():
    with pytest.raises(UsageError, match="--max-batch-size: found 0, expected 1 or more"):
        plan_model(artifact(), "topics", 0)


# The bank inside


@pytest.fixture
def bank(tmp_path):
    """Base, `b`, `a` and `c`, in this order; `b` is removed again."""
    made = Bank.create(tmp_path / "bank", np.ones(3, np.float32))
    for number, name in enumerate("bac", 2):
        entry = AdapterEntry(f"sha256:{name}", name, 3)
        made.add(name, np.full(3, number, np.float32), entry)
    made.remove("b")
    return made


def test_a_bank_inside_multiplies_each_row_by_its_own_adapter(bank, tmp_path):
    snapshot = bank.snapshot()
    rows = rows_in_use(snapshot)
    write_bank(snapshot, rows.values(), tmp_path)
    model = ir.from_onnx_text(BANK_GRAPH)

    BuildInBank(tmp_path, len(rows))(model)
    ir.save(model, tmp_path / "model.onnx")

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [value.name for value in session.get_inputs()] == ["x", "adapter_ids"]
    feeds = {"x": np.ones((3, 3), np.float32), "adapter_ids": np.array([2, 0, 1])}
    (found,) = session.run(None, feeds)
    np.testing.assert_array_equal(found[:, 0], [4, 1, 3])  # c, base, a


def test_an_id_that_nobody_has_spoils_its_own_row_alone(bank, tmp_path):
    snapshot = bank.snapshot()
    rows = rows_in_use(snapshot)
    write_bank(snapshot, rows.values(), tmp_path)
    model = ir.from_onnx_text(BANK_GRAPH)
    BuildInBank(tmp_path, len(rows))(model)
    ir.save(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")

    ids = np.array([2, -1, 3, 10**9, -(10**9), 0])
    (found,) = session.run(None, {"x": np.ones((6, 3), np.float32), "adapter_ids": ids})

    np.testing.assert_array_equal(found[:, 0], [4, np.nan, np.nan, np.nan, np.nan, 1])


def test_rows_are_numbered_as_they_were_added_and_removed_ones_stay_behind(bank, tmp_path):
    snapshot = bank.snapshot()
    rows = rows_in_use(snapshot)

    write_bank(snapshot, rows.values(), tmp_path)

    assert list(rows) == ["base", "a", "c"]
    written = np.fromfile(tmp_path / BANK_FILE, np.float32).reshape(-1, 3)
    np.testing.assert_array_equal(written[:, 0], [1, 3, 4, np.nan])


def test_a_row_that_is_not_the_recorded_one_is_not_packaged(bank, tmp_path):
    with bank.find_file().open("r+b") as file:
        file.seek(2 * 3 * 4)  # the row of `a`
        file.write(b"\x01")
    snapshot = bank.snapshot()

    with pytest.raises(ArtifactError, match=r"row 2 is sha256:.*, expected sha256:"):
        write_bank(snapshot, rows_in_use(snapshot).values(), tmp_path)


def test_a_graph_without_a_bank_is_not_touched(tmp_path):
    model = ir.from_onnx_text(BANK_GRAPH.replace("propulsion_bank", "other"))

    with pytest.raises(ir.passes.PreconditionError, match="propulsion_bank: expected an input"):
        BuildInBank(tmp_path, 2)(model)
    assert len(model.graph.inputs) == 3


def test_clients_are_told_ids_labels_and_digests():
    entries = {
        "a": AdapterEntry("sha256:a", "a", 3, labels=("é", "y")),
        "b": AdapterEntry("d", "b", 3),
    }

    told = json.loads(adapters_text({"base": 0, "a": 1, "b": 2}, entries, BASE))

    assert told == {
        "base": {"id": 0, "labels": ["no", "yes"], "problem_type": None, "digest": None},
        "a": {"id": 1, "labels": ["é", "y"], "problem_type": None, "digest": "sha256:a"},
        "b": {"id": 2, "labels": None, "problem_type": None, "digest": "d"},
    }
