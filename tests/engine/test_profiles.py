import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propulsion_export.engine.profiles import choose_profile, longest_sequence, parse_shapes
from propulsion_export.errors import ArtifactError, UsageError
from propulsion_export.manifest import TensorSpec

ENCODER = (
    TensorSpec("input_ids", "int64", ("batch", "sequence")),
    TensorSpec("attention_mask", "int64", ("batch", "sequence")),
    TensorSpec("propulsion_scales", "float32", (6,), optional=True),
)
DECODER = (
    TensorSpec("input_ids", "int64", ("batch", "sequence")),
    TensorSpec("attention_mask", "int64", ("batch", "past_sequence + sequence")),
    TensorSpec("past_key_values.0.key", "float32", ("batch", 2, "past_sequence", 16)),
)
NONE = ({}, {}, {})


def test_shapes_are_read_in_the_syntax_of_trtexec():
    read = parse_shapes("input_ids:1x8, past_key_values.0.key:1x2x0x16,model/a:0:7")

    assert read == {"input_ids": (1, 8), "past_key_values.0.key": (1, 2, 0, 16), "model/a:0": (7,)}


names = st.text("abc._/:0", min_size=1)
shapes = st.lists(st.integers(0, 10**6), min_size=1, max_size=5).map(tuple)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.dictionaries(names, shapes, min_size=1))
def test_written_shapes_are_read_back(expected):
    text = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in expected.items())

    assert parse_shapes(text) == expected


@pytest.mark.parametrize(
    ("text", "found"),
    [
        pytest.param("", "''", id="empty"),
        pytest.param("input_ids", "'input_ids'", id="no-shape"),
        pytest.param("input_ids:", "'input_ids:'", id="empty-shape"),
        pytest.param(":1x8", "':1x8'", id="no-name"),
        pytest.param("input_ids:1x-1", "'input_ids:1x-1'", id="negative"),
        pytest.param("input_ids:1*8", r"'input_ids:1\*8'", id="other-sign"),
        pytest.param("a:1,,b:2", "''", id="gap"),
        pytest.param("a:1,a:2", "'a' twice", id="twice"),
    ],
)
def test_other_texts_are_refused_with_what_was_found(text, found):
    with pytest.raises(UsageError, match=f"found {found}.*NAME:1x8") as refusal:
        parse_shapes(text)

    assert refusal.value.exit_code == 2


def test_all_wrong_items_are_named_at_once():
    with pytest.raises(UsageError, match=r"'one'.*'two'"):
        parse_shapes("one,fine:1,two")


def test_the_default_profile_is_that_of_a_sentence_encoder():
    expected = {"min": [1, 1], "opt": [8, 128], "max": [32, 512]}

    profile = choose_profile(ENCODER, NONE, None)

    assert profile == {"input_ids": expected, "attention_mask": expected}


@pytest.mark.parametrize(
    ("longest", "expected"), [(64, [64, 64]), (300, [128, 300]), (4096, [128, 512])]
)
def test_default_sequences_fit_the_positions_of_the_model(longest, expected):
    shapes = choose_profile(ENCODER, NONE, longest)["input_ids"]

    assert [shapes["opt"][1], shapes["max"][1]] == expected


def test_a_decoder_may_start_with_an_empty_past_and_its_mask_covers_both():
    profile = choose_profile(DECODER, NONE, 100)

    assert profile["past_key_values.0.key"]["min"] == [1, 2, 0, 16]
    for level in ("min", "opt", "max"):
        past = profile["past_key_values.0.key"][level][2]
        new = profile["input_ids"][level][1]
        assert profile["attention_mask"][level][1] == past + new
    assert profile["attention_mask"]["max"][1] == 100


def test_shapes_given_for_one_input_hold_for_the_others_that_share_its_dimensions():
    given_shapes = ({"input_ids": (2, 3)}, {"input_ids": (4, 5)}, {"input_ids": (6, 7)})

    profile = choose_profile(ENCODER, given_shapes, None)

    assert profile["attention_mask"] == {"min": [2, 3], "opt": [4, 5], "max": [6, 7]}


@pytest.mark.parametrize(
    ("given_shapes", "expected"),
    [
        pytest.param(((64, 9), None, None), [(64, 9), (64, 128), (64, 512)], id="only-min"),
        pytest.param((None, (64, 9), None), [(1, 1), (64, 9), (64, 512)], id="only-opt"),
        pytest.param((None, None, (4, 9)), [(1, 1), (4, 9), (4, 9)], id="only-max"),
    ],
)
def test_defaults_move_out_of_the_way_of_given_shapes(given_shapes, expected):
    named = [{"input_ids": shape} if shape else {} for shape in given_shapes]

    shapes = choose_profile(ENCODER, named, None)["input_ids"]

    assert [tuple(shapes[level]) for level in ("min", "opt", "max")] == expected


sizes = st.tuples(st.integers(1, 64), st.integers(1, 512))


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(st.none() | sizes, min_size=3, max_size=3), st.integers(512, 1024))
def test_a_profile_is_ordered_and_holds_what_was_given_or_is_refused(given_shapes, longest):
    named = [{"input_ids": shape} if shape else {} for shape in given_shapes]
    known = [shape for shape in given_shapes if shape]
    ordered = all(
        low <= high
        for before, after in pairwise(known)
        for low, high in zip(before, after, strict=True)
    )

    if not ordered:
        with pytest.raises(UsageError, match="min <= opt <= max"):
            choose_profile(ENCODER, named, longest)
        return
    shapes = choose_profile(ENCODER, named, longest)["input_ids"]
    for level, shape in zip(("min", "opt", "max"), given_shapes, strict=True):
        assert shape is None or tuple(shapes[level]) == shape
    assert all(a <= b <= c for a, b, c in zip(*shapes.values(), strict=True))


@pytest.mark.parametrize(
    ("level", "shapes", "message"),
    [
        pytest.param(
            0,
            {"ids": (1, 8)},
            r"--min-shapes: found the input 'ids', expected one of input_ids, "
            "attention_mask, propulsion_scales",
            id="unknown",
        ),
        pytest.param(
            1,
            {"input_ids": (1, 8, 3)},
            "--opt-shapes: found input_ids:1x8x3, expected batchxsequence",
            id="rank",
        ),
        pytest.param(
            2,
            {"propulsion_scales": (7,)},
            "--max-shapes: found propulsion_scales:7, expected 6",
            id="fixed",
        ),
        pytest.param(
            2,
            {"input_ids": (4, 8), "attention_mask": (5, 8)},
            "--max-shapes: found batch 5 in attention_mask, expected 4",
            id="conflict",
        ),
        pytest.param(2, {"input_ids": (0, 8)}, "found batch min 0", id="empty-batch"),
        pytest.param(
            2, {"input_ids": (4, 513)}, "found sequence 513, expected at most 512", id="too-long"
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(level, shapes, message):
    named = [shapes if index == level else {} for index in range(3)]

    with pytest.raises(UsageError, match=message):
        choose_profile(ENCODER, named, 512)


def test_all_misfits_are_named_at_once():
    with pytest.raises(
        UsageError, match=r"--min-shapes: found the input 'a'.*--max-shapes: found the input 'b'"
    ):
        choose_profile(ENCODER, ({"a": (1,)}, {}, {"b": (1,)}), 512)


def test_a_fixed_input_may_be_given_its_own_shape():
    profile = choose_profile(ENCODER, ({}, {"propulsion_scales": (6,)}, {}), None)

    assert "propulsion_scales" not in profile


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param({"max_position_embeddings": 512}, 512, id="bert"),
        pytest.param({"n_positions": 1024}, 1024, id="gpt2"),
        pytest.param({"text_config": {"max_position_embeddings": 77}}, 77, id="nested"),
        pytest.param({"hidden_size": 3}, None, id="unknown"),
    ],
)
def test_the_longest_sequence_is_read_from_the_configuration(tmp_path, config, expected):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))

    assert longest_sequence(file) == expected


def test_a_damaged_configuration_is_an_error_and_none_is_not(tmp_path):
    assert longest_sequence(tmp_path / "config.json") is None

    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="is no JSON"):
        longest_sequence(tmp_path / "config.json")
