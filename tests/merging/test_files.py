"""Tensors are distributed over files as transformers does, or as the base model has them."""

import itertools
import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from propulsion_export.base_model.checkpoint import Checkpoint
from propulsion_export.merging.changes import Copied, Given, Scaled
from propulsion_export.merging.files import index_of, plan_files, plan_shards
from propulsion_export.merging.plan import Plan
from propulsion_export.merging.writing import Output, write_outputs


def given_arrays(sizes, dtype=np.float32):
    return {f"t{index}": Given(np.zeros(size, dtype)) for index, size in enumerate(sizes)}


def plan_of(changes, keys=None):
    return Plan("one", "base", changes, keys or {}, True)


@pytest.fixture
def base(tmp_path):
    """A checkpoint of two files, whose headers no library of today writes."""
    random, weight_map = np.random.default_rng(0), {}
    for number, names in ((1, "ba"), (2, "c")):
        file = tmp_path / f"part-{number}.safetensors"
        tensors = {name: random.normal(size=(5, 3)).astype(np.float32) for name in names}
        save_file(tensors, file, metadata={"format": "pt", "made by": "hand"})
        weight_map |= dict.fromkeys(names, file.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return Checkpoint.find(str(tmp_path))


def copied(checkpoint):
    return {name: Copied(tensor) for name, tensor in checkpoint.tensors.items()}


@settings(deadline=None, max_examples=60, derandomize=True)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12), limit=st.integers(1, 400))
def test_every_tensor_is_in_one_shard_in_order_and_shards_keep_the_limit(sizes, limit):
    changes = given_arrays(sizes)

    shards = plan_shards(changes, limit)

    assert [name for shard in shards for name in shard] == list(changes)
    for shard in shards:
        assert len(shard) == 1 or sum(each.values.nbytes for each in shard.values()) <= limit
    for shard, following in itertools.pairwise(shards):
        first = next(iter(following.values())).values.nbytes
        assert sum(each.values.nbytes for each in shard.values()) + first > limit


def test_dtype_written_counts_towards_the_limit(base):
    half = {n: Scaled(t, np.ones((1, 1)), "F16") for n, t in base.tensors.items()}

    assert len(plan_shards(half, 90)) == 1
    assert len(plan_shards(copied(base), 90)) == 3


def test_files_of_the_base_model_are_kept_with_their_headers(base):
    changes = copied(base) | {"c": Scaled(base.tensors["c"], np.full((5, 1), 2.0))}

    files = plan_files(plan_of(changes, {name: name for name in changes}), base)

    assert [file.name for file in files] == ["part-1.safetensors", "part-2.safetensors"]
    assert [file.unchanged for file in files] == [True, False]
    for file in files:
        assert file.base.read_bytes().startswith(file.header)
        assert file.size == file.base.stat().st_size


def test_a_tensor_that_two_files_hold_is_written_once(base, tmp_path):
    values = np.full((5, 3), 7.0, np.float32)
    both = {"c": base.tensors["c"].read(), "a": values}
    save_file(both, tmp_path / "part-2.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.find(str(tmp_path))
    changes = copied(checkpoint) | {"c": Scaled(checkpoint.tensors["c"], np.full((5, 1), 2.0))}
    plan = plan_of(changes, {name: name for name in changes})

    files = plan_files(plan, checkpoint)

    (tmp_path / "out").mkdir()
    write_outputs([Output(tmp_path / "out", plan, files)])
    (written,) = (tmp_path / "out").glob("*.safetensors")
    found = load_file(written)
    assert found.keys() == {"a", "b", "c"}
    np.testing.assert_array_equal(found["a"], values)  # of the last file, as transformers reads it
    np.testing.assert_array_equal(found["b"], base.tensors["b"].read())
    np.testing.assert_array_equal(found["c"], 2 * both["c"])


def another_dtype(base):
    return copied(base) | {"c": Scaled(base.tensors["c"], np.ones((1, 1)), "BF16")}


def another_name(base):
    found = copied(base)
    return {**found, "d": found.pop("c")}


def one_less(base):
    found = copied(base)
    del found["a"]
    return found


def another_shape(base):
    return copied(base) | {"a": Given(np.zeros((5, 4), np.float32))}


def another_dtype_given(base):
    return copied(base) | {"a": Given(np.zeros((5, 3), ml_dtypes.bfloat16))}


@pytest.mark.parametrize(
    "change", [another_dtype, another_name, one_less, another_shape, another_dtype_given]
)
def test_other_tensors_or_dtypes_are_distributed_anew(change, base):
    files = plan_files(plan_of(change(base)), base)

    assert [file.name for file in files] == ["model.safetensors"]
    assert files[0].base is None
    assert not files[0].unchanged


def test_a_tensor_that_is_another_in_the_checkpoint_is_distributed_anew(base):
    """Two parameters that share a weight may swap their names."""
    swapped = copied(base)
    plan = plan_of(swapped, {"a": "b", "b": "a", "c": "c"})

    assert [file.name for file in plan_files(plan, base)] == ["model.safetensors"]


def test_a_size_that_the_base_models_files_exceed_is_kept(base):
    plan = plan_of(copied(base), {name: name for name in "abc"})

    within = plan_files(plan, base, 10**4)
    beyond = plan_files(plan, base, 100)

    assert [file.name for file in within] == ["part-1.safetensors", "part-2.safetensors"]
    assert [file.name for file in beyond] == [f"model-0000{i}-of-00003.safetensors" for i in "123"]


def test_several_files_have_an_index_with_the_size_of_all(base):
    changes = given_arrays([10, 10, 10])

    files = plan_files(plan_of(changes), base, 80)

    index = json.loads(index_of(files)["model.safetensors.index.json"])
    assert index["metadata"] == {"total_size": 120}
    assert index["weight_map"] == {
        "t0": "model-00001-of-00002.safetensors",
        "t1": "model-00001-of-00002.safetensors",
        "t2": "model-00002-of-00002.safetensors",
    }
    assert index_of(plan_files(plan_of(changes), base)) == {}


def test_data_starts_at_a_multiple_of_eight_bytes(base):
    for length in range(1, 9):
        (file,) = plan_files(plan_of({"x" * length: Given(np.ones(3))}), base)

        assert len(file.header) % 8 == 0
        assert int.from_bytes(file.header[:8], "little") == len(file.header) - 8
