from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.file_names import ENCODER_DECODER_FILES
from propulsion_export.artifacts.manifest import (
    AdapterEntry,
    BaseEntry,
    GraphEntry,
    Manifest,
)
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.errors import UsageError
from propulsion_export.packaging.onnx_adapter import check_has_adapter_files, write_onnx_adapter

SWITCHABLE = Manifest(
    kind="onnx",
    mode="switchable",
    task="token-classification",
    dtype="float16",
    base=BaseEntry("some/model", Fingerprint("float32", {"weight": (0.5,) * 8})),
    adapters={"a": AdapterEntry("sha256:a", "a", 3, "adapters/a.safetensors")},
)
GRAPHS = dict.fromkeys(ENCODER_DECODER_FILES, GraphEntry((), ()))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_adapter_file_holds_the_feeds_bit_for_bit(dtype, tmp_path):
    feeds = {
        "propulsion_scales": np.random.default_rng(0).normal(1, 0.2, 100_000).astype(dtype),
        "propulsion_biases": np.random.default_rng(1).normal(size=7).astype(dtype),
    }

    write_onnx_adapter(tmp_path / "a.onnx_adapter", feeds, adapter="sha256:00", base="{}")

    read = onnxruntime.AdapterFormat.read_adapter(str(tmp_path / "a.onnx_adapter"))
    found = {name: value.numpy() for name, value in read.get_parameters().items()}
    assert found.keys() == feeds.keys()
    for name in feeds:
        np.testing.assert_array_equal(found[name], feeds[name], strict=True)


def test_versions_tell_adapters_and_base_models_apart(tmp_path):
    def versions(adapter, base):
        file = tmp_path / "a.onnx_adapter"
        write_onnx_adapter(file, {"x": np.ones(2, np.float32)}, adapter=adapter, base=base)
        read = onnxruntime.AdapterFormat.read_adapter(str(file))
        return read.get_adapter_version(), read.get_model_version()

    first, again = versions("one", "base"), versions("one", "base")
    other, another = versions("two", "base"), versions("one", "other")

    assert first == again
    assert first[1] == other[1] != another[1]
    assert first[0] == another[0] != other[0]
    assert min(*first, *other, *another) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "folded"}, "of kind onnx and folded, expected a switchable .*--mode switchable"),
        ({"mode": "bank"}, "of kind onnx and bank, expected a switchable .*--mode switchable"),
        ({"kind": "engine"}, "of kind engine and switchable, expected a switchable ONNX export"),
        ({"dtype": "bfloat16"}, "is in bfloat16, .*--dtype float32 or float16"),
        (
            {"task": "text2text-generation", "graphs": GRAPHS},
            "has 3 graphs, expected one: .*Feed adapters/NAME.safetensors to each",
        ),
    ],
)
def test_what_no_adapter_file_fits_is_refused_with_the_way_out(changes, message):
    check_has_adapter_files(Artifact(Path("export"), SWITCHABLE))

    with pytest.raises(UsageError, match=f"^export: .*{message}"):
        check_has_adapter_files(Artifact(Path("export"), replace(SWITCHABLE, **changes)))


@pytest.mark.parametrize("task", ["text-generation", "feature-extraction", "question-answering"])
def test_any_task_of_one_graph_has_adapter_files(task):
    check_has_adapter_files(Artifact(Path("export"), replace(SWITCHABLE, task=task)))
