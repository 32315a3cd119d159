"""Files are written as planned, from one reading, or not at all."""

import hashlib
import os
from collections import Counter

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from propulsion_export.artifacts.rounding import rounded
from propulsion_export.base_model.checkpoint import Checkpoint
from propulsion_export.base_model.tensor_files import DTYPES
from propulsion_export.errors import AdapterError, BaseModelError, UsageError, VerificationError
from propulsion_export.merging import meter, pieces, sharing, writing
from propulsion_export.merging.changes import Copied, Given, Scaled
from propulsion_export.merging.files import plan_files
from propulsion_export.merging.plan import NAMES, Plan
from propulsion_export.merging.verifying import verify_output
from propulsion_export.merging.writing import Output, write_outputs

PLAIN = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that tiny tensors have many."""
    monkeypatch.setattr(pieces, "BLOCK", 64)
    monkeypatch.setattr(pieces, "_COPIED", 100)


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    random = np.random.default_rng(0)
    shapes = {"a": (37, 11), "b": (4, 6, 9), "c": (5,), "d": (64, 64)}
    tensors = {n: random.normal(size=s).astype(ml_dtypes.bfloat16) for n, s in shapes.items()}
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint.find(str(tmp_path / "base"))


@pytest.fixture
def make_output(base, tmp_path):
    """`make_output(name, changes)`: what is to be written; other tensors are copied."""

    def make(name, changes, max_shard_size=None, changed=False):
        (tmp_path / name).mkdir()
        everything = {n: Copied(tensor) for n, tensor in base.tensors.items()} | changes
        plan = Plan(name, "base", everything, {n: n for n in base.tensors}, changed)
        return Output(tmp_path / name, plan, plan_files(plan, base, max_shard_size))

    return make


def scaled(base, name, seed=1, dtype=None):
    tensor = base.tensors[name]
    shape = (tensor.shape[0], *(1,) * (len(tensor.shape) - 1))
    return Scaled(tensor, np.random.default_rng(seed).uniform(-2, 2, shape), dtype)


def expected(change):
    if isinstance(change, Given):
        return change.values
    values = change.stored.read()
    if isinstance(change, Copied):
        return values
    dtype = DTYPES[change.dtype or change.stored.dtype]
    return rounded(values.astype(np.float64) * change.factors, dtype)


def assert_written(output, digests):
    for file in output.files:
        content = (output.directory / file.name).read_bytes()
        assert digests[file.name] == f"sha256:{hashlib.sha256(content).hexdigest()}"
        found = load_file(output.directory / file.name)
        assert found.keys() == file.changes.keys()
        for name, change in file.changes.items():
            np.testing.assert_array_equal(found[name], expected(change), strict=True)


@pytest.mark.parametrize("dtype", [None, "F32", "F16"])
@pytest.mark.parametrize("limit", [None, 1000])
def test_what_is_planned_is_written_and_hashed(dtype, limit, base, make_output):
    changes = {name: scaled(base, name, dtype=dtype) for name in "ab"}
    output = make_output("out", changes | {"c": Given(np.arange(5.0))}, limit)

    (digests,) = write_outputs([output])

    assert_written(output, digests)
    assert set(digests) == {file.name for file in output.directory.iterdir()}


def test_several_outputs_are_written_from_one_reading(base, make_output, monkeypatch):
    read = Counter()
    preadv = os.preadv

    def counted(descriptor, buffers, offset):
        read[offset] += sum(map(len, buffers))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(writing.os, "preadv", counted)
    outputs = [
        make_output("one", {"a": scaled(base, "a", 1)}),
        make_output("two", {"a": scaled(base, "a", 2), "b": scaled(base, "b", 3)}),
        make_output("three", {"d": scaled(base, "d", 4), "c": Given(np.ones(5, np.float32))}),
    ]

    digests = write_outputs(outputs)

    for output, found in zip(outputs, digests, strict=True):
        assert_written(output, found)
    contents = [(o.directory / "model.safetensors").read_bytes() for o in outputs]
    assert len(set(contents)) == 3
    assert sum(read.values()) == sum(tensor.size for tensor in base.tensors.values())


@pytest.mark.parametrize("dtype", PLAIN)
def test_every_dtype_is_copied(dtype, tmp_path):
    array = np.arange(6).reshape(2, 3).astype(DTYPES[dtype])
    save_file({"x": array, "scalar": np.array(array[0, 1])}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.find(str(tmp_path))
    (tmp_path / "out").mkdir()
    changes = {name: Copied(tensor) for name, tensor in checkpoint.tensors.items()}
    plan = Plan("one", "base", changes, {}, True)

    write_outputs([Output(tmp_path / "out", plan, plan_files(plan, checkpoint))])

    found = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(found["x"], array, strict=True)
    assert found["scalar"].shape == ()
    assert NAMES[found["x"].dtype] == dtype


def test_a_file_says_whose_format_it_is(base, make_output):
    output = make_output("out", {"a": scaled(base, "a", dtype="F32")})

    write_outputs([output])

    with safe_open(output.directory / "model.safetensors", framework="np") as content:
        assert content.metadata() == {"format": "pt"}


def test_a_product_that_is_not_finite_is_refused_by_name(base, make_output):
    huge = Scaled(base.tensors["d"], np.full((64, 1), 1e30), "F16")

    with pytest.raises(AdapterError, match=r"^d: \[\d+, \d+\]: .* not finite in float16.*--dtype"):
        write_outputs([make_output("out", {"d": huge})])


def test_only_an_adapter_without_effect_is_refused(base, make_output):
    ones = {"a": Scaled(base.tensors["a"], np.ones((37, 1)))}
    outputs = [make_output("right", {"a": scaled(base, "a")}), make_output("same", ones)]

    with pytest.raises(AdapterError, match=r"adapter same: changes no weight") as caught:
        write_outputs(outputs)

    assert len(caught.value.findings) == 1
    write_outputs([make_output("known", ones, changed=True)])


def test_a_base_model_that_is_shortened_while_it_is_read_is_refused(base, make_output):
    output = make_output("out", {"a": scaled(base, "a")})
    os.truncate(base.tensors["d"].file, base.tensors["d"].offset + 1000)

    with pytest.raises(BaseModelError, match=r"model\.safetensors: is truncated"):
        write_outputs([output])


def test_a_read_error_names_the_file(base, make_output, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(writing.os, "preadv", broken)

    with pytest.raises(BaseModelError, match=r"cannot be read \(Input/output error\)"):
        write_outputs([make_output("out", {"a": scaled(base, "a")})])


def test_progress_is_in_bytes_per_second(base, make_output, monkeypatch):
    monkeypatch.setattr(meter, "_EVERY", 0.0)
    lines = []

    write_outputs([make_output("out", {"a": scaled(base, "a")})], lambda *line: lines.append(line))

    shares = [share for share, _ in lines]
    assert shares == sorted(shares)
    assert all(0.1 <= share <= 0.95 for share in shares)
    assert all(" GB, " in text and text.endswith(" MB/s") for _, text in lines)


# Files that stay as they are


def test_an_unchanged_file_is_linked_when_shared_and_copied_when_not(base, make_output):
    for share in (True, False):
        output = make_output(f"out-{share}", {}, changed=True)

        (digests,) = write_outputs([output], share=share)

        assert_written(output, digests)
        written = output.directory / "model.safetensors"
        assert written.samefile(base.tensors["a"].file) == share


def test_a_changed_file_is_not_linked(base, make_output):
    output = make_output("out", {"a": scaled(base, "a")})

    write_outputs([output], share=True)

    assert (output.directory / "model.safetensors").stat().st_nlink == 1


def test_where_no_link_is_possible_it_is_refused(base, make_output, monkeypatch):
    def elsewhere(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(sharing.os, "link", elsewhere)

    with pytest.raises(UsageError, match=r"cannot be linked .*cross-device.* --share"):
        write_outputs([make_output("out", {}, changed=True)], share=True)


def test_a_file_system_that_clones_is_made_use_of(base, make_output, monkeypatch):
    def cloned(target, request, source):
        os.pwrite(target, os.pread(source, 10**6, 0), 0)

    monkeypatch.setattr(sharing.fcntl, "ioctl", cloned)
    monkeypatch.setattr(writing.os, "preadv", None)  # nothing else reads
    output = make_output("out", {}, changed=True)

    (digests,) = write_outputs([output])

    assert_written(output, digests)


# Reading the output again


def test_what_was_written_is_verified(base, make_output):
    changes = {"a": scaled(base, "a"), "b": scaled(base, "b"), "c": Given(np.arange(5.0))}
    output = make_output("out", changes)

    (digests,) = write_outputs([output])

    verify_output(output, digests)


@pytest.mark.parametrize("name", "abcd")
def test_a_bit_that_flips_is_noticed(name, base, make_output):
    output = make_output("out", {"a": scaled(base, "a")})
    (digests,) = write_outputs([output])
    file = output.directory / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[base.tensors[name].offset + 3] ^= 1
    file.write_bytes(content)

    with pytest.raises(VerificationError, match=r"not what was written") as caught:
        verify_output(output, digests)

    assert caught.value.exit_code == 1


def test_a_product_that_was_wrong_when_it_was_hashed_is_noticed(base, make_output):
    right, wrong = scaled(base, "a", 1), scaled(base, "a", 2)
    output = make_output("out", {"a": wrong})
    (digests,) = write_outputs([output])
    planned = make_output("planned", {"a": right})
    claimed = Output(output.directory, planned.plan, planned.files)

    with pytest.raises(VerificationError, match=r"a: row 0 is not the base model's row times"):
        verify_output(claimed, digests)


def test_a_wrong_dtype_and_a_missing_tensor_are_noticed(base, make_output):
    output = make_output("out", {"a": scaled(base, "a")})
    (digests,) = write_outputs([output])
    other = make_output("other", {"a": scaled(base, "a", dtype="F32")})
    more = make_output("more", {"z": Given(np.ones(3))})

    for planned, message in ((other, r"a: is BF16 .* expected F32"), (more, r"other tensors")):
        with pytest.raises(VerificationError, match=message):
            verify_output(Output(output.directory, planned.plan, planned.files), digests)
