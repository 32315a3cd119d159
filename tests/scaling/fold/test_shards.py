"""Shards written tensor by tensor are safetensors files like any other."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

from propulsion_export.scaling.fold.shards import DTYPE_NAMES, ShardWriter, plan_shards


def tensors_of(sizes, dtype=torch.float32):
    return {f"t{index}": torch.arange(size).to(dtype) for index, size in enumerate(sizes)}


def write(directory, tensors, limit, order=None):
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    shards = plan_shards(tensors, dtypes, limit)
    with ShardWriter(directory, tensors, dtypes, shards) as writer:
        for name in order or tensors:
            writer.write(name, tensors[name])
    return shards


@settings(deadline=None, max_examples=60, derandomize=True)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12), limit=st.integers(1, 400))
def test_every_tensor_is_in_one_shard_in_order_and_shards_keep_the_limit(sizes, limit):
    tensors = tensors_of(sizes)

    shards = plan_shards(tensors, dict.fromkeys(tensors, torch.float32), limit)

    assert [name for shard in shards for name in shard] == list(tensors)
    for shard in shards:
        assert len(shard) == 1 or sum(4 * tensors[name].numel() for name in shard) <= limit
    for shard, following in itertools.pairwise(shards):
        together = sum(4 * tensors[name].numel() for name in [*shard, following[0]])
        assert together > limit  # not a shard more than needed


def test_dtype_written_counts_towards_the_limit_not_the_dtype_held():
    tensors = tensors_of([8, 8])

    assert len(plan_shards(tensors, dict.fromkeys(tensors, torch.float16), 32)) == 1
    assert len(plan_shards(tensors, dict.fromkeys(tensors, torch.float32), 32)) == 2


@pytest.mark.parametrize("dtype", list(DTYPE_NAMES), ids=str)
def test_every_dtype_is_read_back_by_safetensors(dtype, tmp_path):
    tensors = tensors_of([1, 6], dtype) | {"scalar": torch.tensor(1).to(dtype)}

    write(tmp_path, tensors, 10**6)

    assert_close(load_file(tmp_path / "model.safetensors"), tensors, rtol=0, atol=0)


def test_tensors_may_come_in_any_order_and_in_any_layout(tmp_path):
    tensors = {"a": torch.randn(3, 4).T, "b": torch.randn(5, 2)[:, 1], "c": torch.randn(2, 2)}

    write(tmp_path, tensors, 10**6, order=["c", "a", "b"])

    assert_close(load_file(tmp_path / "model.safetensors"), tensors, rtol=0, atol=0)


def test_several_shards_have_an_index_with_the_size_of_all(tmp_path):
    tensors = tensors_of([10, 10, 10])

    shards = write(tmp_path, tensors, 80)

    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert shards == [["t0", "t1"], ["t2"]]
    assert index["metadata"] == {"total_size": 120}
    assert index["weight_map"] == {
        "t0": "model-00001-of-00002.safetensors",
        "t1": "model-00001-of-00002.safetensors",
        "t2": "model-00002-of-00002.safetensors",
    }
    assert not (tmp_path / "model.safetensors").exists()


def test_one_shard_has_no_index_and_says_whose_format_it_is(tmp_path):
    write(tmp_path, tensors_of([3]), 10**6)

    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as content:
        assert content.metadata() == {"format": "pt"}


def test_data_starts_at_a_multiple_of_eight_bytes(tmp_path):
    for length in range(1, 9):
        tensors = {"x" * length: torch.ones(3)}
        write(tmp_path, tensors, 10**6)

        start = (tmp_path / "model.safetensors").read_bytes()[:8]

        assert int.from_bytes(start, "little") % 8 == 0


def test_cut_shard_is_not_taken_for_a_whole_one(tmp_path):
    write(tmp_path, tensors_of([30]), 10**6)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])

    with pytest.raises(SafetensorError):
        load_file(file)
