from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propulsion_export.artifacts.manifest import TensorSpec
from propulsion_export.engine.profiles import choose_profiles, longest_sequence, parse_shapes
from propulsion_export.errors import UsageError

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

    (profile,) = choose_profiles(ENCODER, NONE, None)

    assert profile == {"input_ids": expected, "attention_mask": expected}


@pytest.mark.parametrize(
    ("longest", "expected"), [(64, [64, 64]), (300, [128, 300]), (4096, [128, 512])]
)
def test_default_sequences_fit_the_positions_of_the_model(longest, expected):
    shapes = choose_profiles(ENCODER, NONE, longest)[0]["input_ids"]

    assert [shapes["opt"][1], shapes["max"][1]] == expected


def covered(profile, batch, query, past):
    """Whether an engine of this profile takes such a step of a decoder."""
    asked = {
        "input_ids": [batch, query],
        "attention_mask": [batch, past + query],
        "past_key_values.0.key": [batch, 2, past, 16],
    }
    return all(
        low <= size <= high
        for name, shape in asked.items()
        for low, size, high in zip(profile[name]["min"], shape, profile[name]["max"], strict=True)
    )


def test_a_decoder_has_a_profile_for_prefill_for_decoding_and_for_both_at_once():
    prefill, decoding, behind = choose_profiles(DECODER, NONE, 100)

    assert prefill["input_ids"] == {"min": [1, 1], "opt": [8, 100], "max": [32, 100]}
    assert [shape[2] for shape in prefill["past_key_values.0.key"].values()] == [0, 0, 0]
    assert decoding["input_ids"] == {"min": [1, 1], "opt": [8, 1], "max": [32, 1]}
    assert [shape[2] for shape in decoding["past_key_values.0.key"].values()] == [1, 50, 99]
    assert [shape[1] for shape in behind["input_ids"].values()] == [1, 50, 50]
    assert [shape[2] for shape in behind["past_key_values.0.key"].values()] == [1, 25, 50]


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.integers(2, 5000), st.data())
def test_every_prompt_and_every_decoding_step_that_has_positions_is_covered(longest, data):
    length = min(longest, 2048)
    profiles = choose_profiles(DECODER, NONE, longest)
    batch = data.draw(st.integers(1, 32))
    query, past = data.draw(st.integers(1, length)), data.draw(st.integers(0, length - 1))

    assert covered(profiles[0], batch, query, 0)
    assert any(covered(profile, batch, 1, past) for profile in profiles)
    if max(query, past) <= length // 2:
        assert any(covered(profile, batch, query, past) for profile in profiles)
    assert not any(covered(profile, batch, length, 1) for profile in profiles)
    for profile in profiles:
        for level in ("min", "opt", "max"):
            past = profile["past_key_values.0.key"][level][2]
            total = past + profile["input_ids"][level][1]
            assert profile["attention_mask"][level][1] == total <= length


def test_a_past_that_may_not_be_empty_shows_in_the_profile():
    given_shapes = ({"past_key_values.0.key": (1, 2, 8, 16)}, {}, {})

    (profile,) = choose_profiles(DECODER, given_shapes, 100)

    assert covered(profile, 1, 1, 8)
    assert not covered(profile, 1, 1, 0)


@pytest.mark.parametrize("longest", [None, 4096])
def test_a_decoder_of_many_positions_or_none_has_2048_by_default(longest):
    prefill, decoding, _ = choose_profiles(DECODER, NONE, longest)

    assert prefill["input_ids"]["max"] == [32, 2048]
    assert decoding["past_key_values.0.key"]["max"] == [32, 2, 2047, 16]


@pytest.mark.parametrize(
    ("shapes", "query", "past"),
    [
        pytest.param({"input_ids": (4, 10)}, 10, 90, id="short-prompts"),
        pytest.param({"input_ids": (4, 100)}, 100, 50, id="long-prompts"),
        pytest.param({"past_key_values.0.key": (4, 2, 20, 16)}, 80, 20, id="short-past"),
        pytest.param({"past_key_values.0.key": (4, 2, 99, 16)}, 50, 99, id="long-past"),
        pytest.param(
            {"input_ids": (4, 7), "past_key_values.0.key": (4, 2, 30, 16)}, 7, 30, id="both"
        ),
        pytest.param({"attention_mask": (4, 100)}, 50, 50, id="total"),
    ],
)
def test_given_shapes_make_one_profile_that_has_room_for_what_is_not_given(shapes, query, past):
    (profile,) = choose_profiles(DECODER, ({}, {}, shapes), 100)

    assert profile["input_ids"]["max"] == [4, query]
    assert profile["past_key_values.0.key"]["max"] == [4, 2, past, 16]
    assert profile["attention_mask"]["max"] == [4, query + past]
    assert covered(profile, 1, 1, 0)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_total_that_is_not_past_and_sequence_together_is_refused(level):
    shapes = {
        "input_ids": (4, 8),
        "attention_mask": (4, 33),
        "past_key_values.0.key": (4, 2, 24, 16),
    }
    named = [shapes if index == level else {} for index in range(3)]

    with pytest.raises(
        UsageError, match=r"-shapes: found past_sequence \+ sequence 33, expected 32, past and"
    ):
        choose_profiles(DECODER, named, 100)

    fitting = [{**shape, "attention_mask": (4, 32)} if shape else {} for shape in named]
    assert len(choose_profiles(DECODER, fitting, 100)) == 1


def test_a_past_beyond_the_positions_is_refused():
    given_shapes = ({}, {}, {"past_key_values.0.key": (4, 2, 101, 16)})

    with pytest.raises(UsageError, match="found past_sequence 101, expected at most 100"):
        choose_profiles(DECODER, given_shapes, 100)


def test_a_model_whose_shapes_are_all_fixed_has_no_profile():
    assert choose_profiles((TensorSpec("input_ids", "int64", (1, 8)),), NONE, 512) == ()


def test_shapes_given_for_one_input_hold_for_the_others_that_share_its_dimensions():
    given_shapes = ({"input_ids": (2, 3)}, {"input_ids": (4, 5)}, {"input_ids": (6, 7)})

    (profile,) = choose_profiles(ENCODER, given_shapes, None)

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

    shapes = choose_profiles(ENCODER, named, None)[0]["input_ids"]

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
            choose_profiles(ENCODER, named, longest)
        return
    shapes = choose_profiles(ENCODER, named, longest)[0]["input_ids"]
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
        choose_profiles(ENCODER, named, 512)


def test_all_misfits_are_named_at_once():
    with pytest.raises(
        UsageError, match=r"--min-shapes: found the input 'a'.*--max-shapes: found the input 'b'"
    ):
        choose_profiles(ENCODER, ({"a": (1,)}, {}, {"b": (1,)}), 512)


def test_a_fixed_input_may_be_given_its_own_shape():
    (profile,) = choose_profiles(ENCODER, ({}, {"propulsion_scales": (6,)}, {}), None)

    assert "propulsion_scales" not in profile


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param({"max_position_embeddings": 512}, 512, id="bert"),
        pytest.param({"n_positions": 1024}, 1024, id="gpt2"),
        pytest.param({"text_config": {"max_position_embeddings": 77}}, 77, id="nested"),
        pytest.param(
            {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1},
            512,
            id="behind-padding",
        ),
        pytest.param({"hidden_size": 3}, None, id="unknown"),
    ],
)
def test_the_longest_sequence_is_read_from_the_configuration(config, expected):
    assert longest_sequence(config) == expected


BANK = (
    *ENCODER[:2],
    TensorSpec("propulsion_bank", "float32", ("adapters", 1000)),
    TensorSpec("adapter_ids", "int64", ("batch",)),
)


def test_a_bank_has_room_for_16384_rows_by_default():
    (profile,) = choose_profiles(BANK, NONE, 512)

    assert profile["propulsion_bank"] == {"min": [1, 1000], "opt": [64, 1000], "max": [16384, 1000]}
    assert profile["adapter_ids"]["max"] == [32]


def test_the_rows_of_a_bank_are_no_positions_of_the_model():
    (profile,) = choose_profiles(BANK, NONE, 8)

    assert profile["propulsion_bank"]["max"] == [16384, 1000]
    assert profile["input_ids"]["max"] == [32, 8]


@pytest.mark.parametrize("width", [131_072, 1_000_000, 2**30])
def test_a_bank_of_wide_adapters_stays_within_what_a_tensor_may_hold(width):
    wide = (*BANK[:2], TensorSpec("propulsion_bank", "float32", ("adapters", width)), BANK[3])

    (profile,) = choose_profiles(wide, NONE, 512)

    rows = profile["propulsion_bank"]["max"][0]
    assert rows * width < 2**31 <= (rows + 1) * width
    assert profile["propulsion_bank"]["opt"][0] <= rows


def test_a_given_bank_is_taken_as_it_is():
    (profile,) = choose_profiles(BANK, ({}, {}, {"propulsion_bank": (40_000, 1000)}), 512)

    assert profile["propulsion_bank"]["max"] == [40_000, 1000]
