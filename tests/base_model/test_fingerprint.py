import json
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from propulsion_export.base_model.fingerprint import Fingerprint

PROPERTY = settings(deadline=None, max_examples=60, derandomize=True)
# What one base can be loaded as; each tuple is the way the weights took.
WAYS = [
    ("float32",),
    ("float16",),
    ("bfloat16",),
    ("float16", "bfloat16"),
]


def weights_of(seed, count=4, scale=0.02):
    chooser = np.random.default_rng(seed)
    return {
        f"encoder.layer.{index}.dense.weight": torch.from_numpy(
            chooser.normal(0, scale, (5 + index, 7)).astype(np.float32)
        )
        for index in range(count)
    }


def loaded_as(weights, way):
    loaded = dict(weights)
    for dtype in way:
        loaded = {name: values.to(getattr(torch, dtype)) for name, values in loaded.items()}
    return loaded


class Matrix:
    """A matrix too large for memory that counts who looks at it."""

    dtype = "torch.bfloat16"

    def __init__(self, shape):
        self.shape, self.reads = shape, []

    def __getitem__(self, position):
        self.reads.append(position)
        return 0.5


@PROPERTY
@given(
    st.integers(0, 2**32),
    st.sampled_from(WAYS),
    st.sampled_from(WAYS),
    # Down to weights that float16 keeps with few bits or none.
    st.sampled_from([1e-8, 1e-6, 1e-4, 0.02, 1.0, 100.0]),
)
@example(1, ("float32",), ("float16", "bfloat16"), 1e-6)
def test_the_same_weights_are_recognised_in_every_dtype(seed, one, other, scale):
    weights = weights_of(seed, scale=scale)
    first, second = (Fingerprint.of(loaded_as(weights, way)) for way in (one, other))

    assert first.difference(second) is None
    assert second.difference(first) is None


@PROPERTY
@given(st.integers(0, 2**32), st.sampled_from(WAYS), st.sampled_from(WAYS))
def test_other_weights_of_the_same_shapes_are_not(seed, one, other):
    first = Fingerprint.of(loaded_as(weights_of(seed), one))
    second = Fingerprint.of(loaded_as(weights_of(seed + 1), other))

    assert "holds" in first.difference(second)
    assert "holds" in second.difference(first)


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_a_base_trained_a_little_further_is_another_one(way):
    weights = weights_of(0)
    further = {name: values * 1.03 for name, values in weights.items()}

    first, second = Fingerprint.of(weights), Fingerprint.of(loaded_as(further, way))

    name = min(weights)
    recorded, found = first.entries[name][0], second.entries[name][0]
    assert first.difference(second) == f"{name} holds {found:.6g} where {recorded:.6g} was recorded"


@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_rounding_is_not_forgiven_in_finer_dtypes(way):
    """What bf16 cannot tell apart, fp32 can."""
    weights = weights_of(0)
    near = {name: values * (1 + 2.0**-9) for name, values in weights.items()}
    first, second = (Fingerprint.of(loaded_as(some, way)) for some in (weights, near))

    assert (first.difference(second) is None) == (way[-1] == "bfloat16")


def test_numpy_and_torch_weights_give_one_fingerprint():
    weights = loaded_as(weights_of(3), ("bfloat16",))
    arrays = {name: values.float().numpy() for name, values in weights.items()}
    arrays = {name: values.astype(ml_dtypes.bfloat16) for name, values in arrays.items()}

    assert Fingerprint.of(arrays) == Fingerprint.of(weights)
    assert Fingerprint.of(arrays).dtype == "bfloat16"


def test_a_mixed_model_has_the_coarsest_of_its_dtypes():
    weights = weights_of(0)
    mixed = {
        name: values.to(dtype)
        for (name, values), dtype in zip(
            weights.items(),
            (torch.float32, torch.bfloat16, torch.float16, torch.float32),
            strict=True,
        )
    }

    assert Fingerprint.of(mixed).dtype == "bfloat16"
    assert Fingerprint.of(mixed).difference(Fingerprint.of(weights)) is None


def test_the_pooler_and_tensors_of_other_ranks_do_not_count():
    weights = weights_of(0)
    more = weights | {
        "pooler.dense.bias": torch.randn(3),
        "pooler.dense.weight": torch.randn(3, 3),
        "conv.weight": torch.randn(2, 2, 3),
        "empty.weight": torch.zeros(0, 4),
    }

    assert Fingerprint.of(more) == Fingerprint.of(weights)


@pytest.mark.parametrize("count", [4, 40, 100])
def test_one_matrix_more_or_less_is_tolerated(count):
    weights = weights_of(5, count)
    without = dict(list(weights.items())[1:])
    first, second = Fingerprint.of(weights), Fingerprint.of(without)

    assert first.difference(second) is None
    assert second.difference(first) is None


def test_half_of_the_matrices_renamed_is_another_base():
    weights = weights_of(5, 8)
    renamed = {name.replace("layer.1", "block.1"): values for name, values in weights.items()}
    names = [f"new.{index}" if index % 2 else name for index, name in enumerate(renamed)]
    renamed = dict(zip(names, weights.values(), strict=True))

    difference = Fingerprint.of(weights).difference(Fingerprint.of(renamed))

    assert difference.startswith("the weight matrices have other names (")


def test_a_base_without_matrices_is_like_no_other_nor_itself():
    nothing = Fingerprint.of({"norm.weight": torch.ones(4)})

    assert nothing.entries == {}
    assert nothing.difference(nothing)
    assert nothing.difference(Fingerprint.of(weights_of(0)))
    assert Fingerprint.of(weights_of(0)).difference(nothing)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("both", [False, True])
def test_numbers_that_are_not_finite_count_as_different(value, both):
    weights = weights_of(0)
    broken = {name: values.clone() for name, values in weights.items()}
    broken[min(broken)][0, 0] = value
    other = Fingerprint.of(broken if both else weights)

    assert Fingerprint.of(broken).difference(other)
    assert other.difference(Fingerprint.of(broken))


def test_it_reads_at_most_64_times_8_entries():
    weights = {f"layer.{index}.weight": Matrix((20_000, 30_000)) for index in range(500)}

    fingerprint = Fingerprint.of(weights)

    counts = [len(matrix.reads) for matrix in weights.values() if matrix.reads]
    assert counts == [8] * 64
    assert len(fingerprint.entries) == 64
    reads = next(matrix.reads for matrix in weights.values() if matrix.reads)
    assert reads[0] == (0, 0)
    assert reads[-1] == (19_999, 29_999)
    assert len(set(reads)) == 8


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (2, 4), (1,), (3,)])
def test_small_matrices_and_vectors_have_eight_entries_too(shape):
    fingerprint = Fingerprint.of({"weight": torch.randn(shape)})

    (entries,) = (fingerprint.entries if len(shape) == 2 else fingerprint.vectors).values()
    assert len(entries) == 8


def test_weights_left_out_are_left_out_of_matrices_and_vectors():
    weights = weights_of(3) | {"classifier.weight": torch.ones(2, 7), "norm.weight": torch.ones(7)}

    left = Fingerprint.of(weights).without({"model.norm.weight", "model.classifier.weight"})

    assert left.entries.keys() == weights_of(3).keys()
    assert not left.vectors


def test_of_many_vectors_the_norms_are_chosen():
    norms = {f"layer.{index}.norm.weight": torch.randn(4) for index in range(40)}
    biases = {f"layer.{index}.dense.bias": torch.randn(4) for index in range(40)}

    chosen = Fingerprint.of(biases | norms).vectors

    assert norms.keys() <= chosen.keys()
    assert len(chosen) == 64


@PROPERTY
@given(st.integers(0, 2**32), st.sampled_from(WAYS))
def test_json_keeps_every_bit(seed, way):
    fingerprint = Fingerprint.of(loaded_as(weights_of(seed), way))

    assert Fingerprint.from_json(json.loads(json.dumps(fingerprint.to_json()))) == fingerprint


ENTRIES = [0.5] * 8


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "text",
        {},
        {"dtype": "float32"},
        {"entries": {}},
        {"dtype": "float32", "entries": []},
        {"dtype": "float32", "entries": {"a": None}},
        {"dtype": "float32", "entries": {"a": 0.5}},
        {"dtype": "float32", "entries": {"a": ENTRIES[1:]}},
        {"dtype": "float32", "entries": {"a": [*ENTRIES, 0.5]}},
        {"dtype": "float32", "entries": {"a": [*ENTRIES[1:], "0.5"]}},
        {"dtype": "float32", "entries": {"a": [*ENTRIES[1:], True]}},
        {"dtype": "float32", "entries": {"a": [*ENTRIES[1:], None]}},
        {"dtype": "float32", "entries": {"a": [*ENTRIES[1:], 10**400]}},
        {"dtype": 32, "entries": {"a": ENTRIES}},
    ],
    ids=lambda value: str(value)[:60],
)
def test_anything_else_is_refused(value):
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        Fingerprint.from_json(value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_that_were_rounded_before_they_are_float32_are_recognised(dtype):
    exact = {"a": torch.randn(16, 16, generator=torch.manual_seed(0)), "b": torch.ones(16) / 3}
    rounded = {"a": exact["a"].to(getattr(torch, dtype)).float(), "b": exact["b"]}
    recorded = Fingerprint.of(exact)

    assert recorded.difference(Fingerprint.of(rounded)) is None
    assert recorded.difference(Fingerprint.of({**rounded, "b": exact["b"] * 1.1})) is not None


def test_weights_that_were_both_rounded_before_must_be_equal():
    rounded = torch.randn(16, 16, generator=torch.manual_seed(0)).bfloat16()
    trained = rounded.clone()
    trained[0, 0] *= 1 + 2**-7

    found = Fingerprint.of({"a": trained.float()})

    assert Fingerprint.of({"a": rounded.float()}).difference(found) is not None
    assert Fingerprint.of({"a": rounded}).difference(found) is None  # a rounding may be the cause


class Quantised:
    """A matrix whose entries were moved by up to the step of a grid."""

    dtype, shape = "float32", (16, 16)

    def __init__(self, weight, step):
        self.weight, self.width = np.round(weight / step) * step, step

    def __getitem__(self, place):
        return self.weight[place]

    def step(self, place):
        return self.width


@pytest.mark.parametrize(("times", "recognised"), [(1, True), (1.2, False)])
def test_a_quantised_base_model_is_recognised_within_the_steps_of_its_grid(times, recognised):
    weight = np.random.default_rng(0).choice([-1, 1], (16, 16)).astype(np.float32)
    recorded = Fingerprint.of({"a.weight": weight})

    found = Fingerprint.of({"a.weight": Quantised(times * weight, 0.07)})

    assert (recorded.difference(found) is None) == recognised
    assert (found.difference(recorded) is None) == recognised
    assert Fingerprint.from_json(found.to_json()) == found
