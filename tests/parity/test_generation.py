"""Each case of a generative model passes a right one and catches the mistake it is for.

The models are numpy: logits of a random table, looked up by all visible tokens and their positions.
"""

from dataclasses import replace

import numpy as np
import pytest

from propulsion_export.artifacts.manifest import TensorSpec
from propulsion_export.artifacts.tensor_names import LOGITS
from propulsion_export.parity.cases import judge
from propulsion_export.parity.generation import continue_greedily, judge_generation, padded_inside
from propulsion_export.parity.subject import Continuation, Subject
from propulsion_export.runners.decoding import (
    CausalModel,
    EncoderDecoder,
    pad_left,
    recomputing,
    replaying,
    row_by_row,
)

VOCABULARY, STEPS, ALLOWED = 17, 64, 1e-3
CHOOSER = np.random.default_rng(3)
TABLE = CHOOSER.normal(size=(VOCABULARY, 6))
HEAD = CHOOSER.normal(size=(6, VOCABULARY))
INPUTS = (TensorSpec("past_key_values.0.key", "float64", ("batch", 1, "past_sequence", 6)),)
BATCH = pad_left([CHOOSER.integers(1, VOCABULARY, n) for n in (14, 9, 12, 7)], 0)
ROWS = [CHOOSER.integers(1, VOCABULARY, length) for length in (5, 12, 9)]


def right(feeds):
    """A decoding step, so far from linear that its tokens do not run into a short cycle."""
    tokens, mask = feeds["input_ids"], feeds["attention_mask"]
    turned = TABLE[tokens] * np.cos(feeds["position_ids"][:, :, None] * np.arange(1, 7))
    keys = np.concatenate([feeds["past_key_values.0.key"][:, 0], turned], axis=1)
    sums = np.sin(5 * (keys * mask[:, :, None]).cumsum(1))[:, -tokens.shape[1] :]
    return {LOGITS: 3 * sums @ HEAD, "present.0.key": keys[:, None]}


def model(step=right):
    return CausalModel(step, INPUTS)


def wrong_when(condition, *, by=1.0):
    """The right decoder, its logits turned round where `condition(feeds)` holds."""

    def step(feeds):
        outputs = right(feeds)
        off = by * np.arange(VOCABULARY) * condition(feeds)
        return outputs | {LOGITS: outputs[LOGITS] + off}

    return model(step)


def subject(*, reference=None):
    oracle = row_by_row(recomputing(model()))(BATCH)
    alone = [continue_greedily(model(), pad_left([row], 0), STEPS) for row in ROWS]
    tokens, margins = (np.concatenate(parts) for parts in zip(*alone, strict=True))
    told = Continuation(pad_left(ROWS, 0), tokens, margins, tokens)
    if reference is not None:
        told = replace(told, reference=reference(tokens))
    inside = recomputing(model())(padded_inside(BATCH))[LOGITS]
    return Subject("one", (oracle,), (oracle,), None, {}, told, inside)


def judged(candidate, *, allowed=ALLOWED, about=None):
    return list(judge_generation(about or subject(), BATCH, candidate, allowed))


def failed(checks):
    return [check.case for check in checks if not check.passed]


def of(case, checks):
    (check,) = [check for check in checks if check.case == case]
    return check


def test_right_decoder_passes_every_case():
    checks = judged(model())

    assert [check.case for check in checks] == [
        "recomputing", "right padding", "padding inside", "greedy"
    ]  # fmt: skip
    assert failed(checks) == []
    assert {check.adapter for check in checks} == {"one"}
    assert checks[-1].detail == "all 64 tokens behind 3 prompts are the oracle's"


def test_oracle_goes_on_with_many_tokens():
    """A continuation of one token over and over would show little."""
    tokens = subject().continuation.tokens

    assert tokens.shape == (3, STEPS)
    assert all(len(np.unique(row[-20:])) > 3 for row in tokens)


def test_decoder_that_is_wrong_only_with_a_cache_fails_where_a_cache_is_read():
    cached = wrong_when(lambda feeds: feeds["past_key_values.0.key"].shape[2] > 0)

    checks = judged(cached)

    assert failed(checks) == ["padding inside", "greedy"]
    assert checks[1].passed  # rows padded at their end are read in one step


def test_decoder_that_is_wrong_only_without_a_cache_fails():
    """The parity case, which steps, would see little of it."""
    whole = wrong_when(
        lambda feeds: (
            feeds["past_key_values.0.key"].shape[2] == 0 and feeds["input_ids"].shape[1] > 12
        )
    )

    assert failed(judged(whole)) == ["recomputing", "right padding"]


def test_decoder_that_is_wrong_only_when_padded_on_the_right_fails_there():
    behind = wrong_when(lambda feeds: (feeds["attention_mask"][:, -1] == 0).any())

    # A batch with padding inside is read piece by piece, and the first piece ends with it.
    assert failed(judged(behind)) == ["right padding", "padding inside"]


def test_decoder_that_is_wrong_only_with_padding_inside_fails_there():
    def gap(feeds):
        return (np.diff(feeds["attention_mask"], axis=1) > 0).any() and (
            feeds["attention_mask"][:, 0] == 1
        ).all()

    checks = judged(wrong_when(gap))

    assert [check.passed for check in checks] == [True, True, False, True]


def test_decoder_that_is_wrong_only_after_40_steps_fails_where_it_goes_on_so_long():
    late = wrong_when(lambda feeds: feeds["past_key_values.0.key"].shape[2] >= 12 + 40)

    checks = judged(late)

    assert failed(checks) == ["greedy"]
    assert "from the oracle at step 4" in checks[-1].detail
    assert "no tie" in checks[-1].detail


def test_error_of_exactly_what_is_allowed_passes_and_a_little_more_fails():
    def off(by):
        return model(lambda feeds: right(feeds) | {LOGITS: right(feeds)[LOGITS] + by})

    assert failed(judged(off(0.99 * ALLOWED))) == []
    assert failed(judged(off(1.01 * ALLOWED))) == ["recomputing", "right padding", "padding inside"]


def flip(row, step, *, to=None):
    """A decoder that takes another token than the oracle once: its second, or `to`."""
    told = subject().continuation
    prompt = told.prompt["input_ids"].shape[1]

    def decode(feeds):
        outputs = right(feeds)
        if feeds["attention_mask"].shape[1] == prompt + step:
            last = outputs[LOGITS][row, -1]
            chosen = np.argsort(last)[-2] if to is None else to
            last[chosen] = last.max() + 1e-9
        return outputs

    return model(decode)


# Where the oracle's two best logits are closest together, but for the first tokens.
NARROW = np.unravel_index(
    (subject().continuation.margins + 9 * (np.arange(STEPS) < 5)).argmin(), (3, STEPS)
)
MARGIN = subject().continuation.margins[NARROW]


@pytest.mark.parametrize("torch_too", [False, True])
def test_tokens_that_part_at_a_tie_pass_and_are_told(torch_too):
    row, step = map(int, NARROW)

    def reference(tokens):
        other = tokens.copy()
        other[row, step] += torch_too
        return other

    checks = judged(flip(row, step), allowed=0.51 * MARGIN, about=subject(reference=reference))

    check = of("greedy", checks)
    assert check.passed
    assert f"prompt {row} parts from the oracle at step {step}" in check.detail
    assert f"{MARGIN:.3g} apart, a tie (up to {1.02 * MARGIN:.3g})" in check.detail
    assert check.detail.endswith("PyTorch itself " + ("does too" if torch_too else "does not"))


def test_tokens_that_part_just_above_a_tie_fail():
    row, step = map(int, NARROW)

    check = of("greedy", judged(flip(row, step), allowed=0.49 * MARGIN))

    assert not check.passed
    assert "no tie" in check.detail


def test_one_prompt_that_parts_without_a_tie_fails_whatever_the_others_do():
    row, step = map(int, NARROW)
    other = (row + 1) % 3
    wide = int(subject().continuation.margins[other].argmax())
    prompt = 12

    def decode(feeds):
        outputs = right(feeds)
        for which, when in ((row, step), (other, wide)):
            if feeds["attention_mask"].shape[1] == prompt + when:
                last = outputs[LOGITS][which, -1]
                last[np.argsort(last)[-2]] = last.max() + 1e-9
        return outputs

    check = of("greedy", judged(model(decode), allowed=0.51 * MARGIN))

    assert not check.passed
    assert f"prompt {row} parts" in check.detail
    assert f"prompt {other} parts" in check.detail


# Not a number


def poisoned(poison, *, where=slice(None)):
    def decode(feeds):
        outputs = right(feeds)
        outputs[LOGITS][..., where] = poison
        return outputs

    return model(decode)


@pytest.mark.parametrize("where", [slice(None), 0, VOCABULARY - 1], ids=["all", "first", "last"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_logits_that_are_not_finite_fail_every_case(poison, where):
    checks = judged(poisoned(poison, where=where))

    assert failed(checks) == ["recomputing", "right padding", "padding inside", "greedy"]
    assert "not finite at step 0" in checks[-1].detail


def test_not_a_number_is_no_tie_even_if_everything_is_one():
    """With NaN the first token is the likeliest, which a generous tie would let pass."""
    checks = judged(poisoned(np.nan), allowed=1e9)

    assert failed(checks) == ["recomputing", "right padding", "padding inside", "greedy"]


def test_not_a_number_that_chooses_the_oracles_token_fails():
    told = subject().continuation
    prompt = told.prompt["input_ids"].shape[1]

    def decode(feeds):
        outputs = right(feeds)
        step = feeds["attention_mask"].shape[1] - prompt
        if len(feeds["input_ids"]) == 3 and step == 30:
            outputs[LOGITS][np.arange(3), -1, told.tokens[:, step]] = np.nan
        return outputs

    checks = judged(model(decode))

    assert failed(checks) == ["greedy"]
    assert checks[-1].detail == "logits are not finite at step 30"


def test_allowed_error_that_is_not_a_number_allows_nothing():
    off = wrong_when(lambda feeds: True)

    assert failed(judged(off, allowed=np.nan)) == [
        "recomputing", "right padding", "padding inside", "greedy"
    ]  # fmt: skip


# Batches, margins, encoder-decoders


def test_padding_moves_before_the_last_tokens_and_to_the_end():
    batch = pad_left([np.arange(1, 9), np.arange(1, 4), np.arange(1, 8)], 0)

    inside, ended = padded_inside(batch, behind=2), padded_inside(batch, behind=0)

    assert inside["input_ids"].tolist() == [
        [1, 2, 3, 4, 5, 6, 7, 8], [1, 0, 0, 0, 0, 0, 2, 3], [1, 2, 3, 4, 5, 0, 6, 7]
    ]  # fmt: skip
    assert ended["input_ids"].tolist() == [
        [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 0]
    ]  # fmt: skip
    for moved in (inside, ended):
        assert ((moved["attention_mask"] == 1) == (moved["input_ids"] > 0)).all()
    assert batch["input_ids"][1].tolist() == [0, 0, 0, 0, 0, 1, 2, 3]


def test_row_shorter_than_what_stays_behind_is_left_as_it_is():
    batch = pad_left([np.arange(1, 9), np.arange(1, 4)], 0)

    assert padded_inside(batch)["input_ids"].tolist() == batch["input_ids"].tolist()


def test_margin_is_between_the_best_logit_and_the_next():
    def step(feeds):
        logits = np.zeros((*feeds["input_ids"].shape, 4), np.float16)
        logits[:, :, [1, 2]] = 3, 2.5
        return {LOGITS: logits, "present.0.key": np.zeros((2, 1, 9, 6))}

    tokens, margins = continue_greedily(model(step), pad_left([[1], [2, 3]], 0), 3)

    assert tokens.tolist() == [[1, 1, 1]] * 2
    assert margins.dtype == np.float64
    assert margins.tolist() == [[0.5] * 3] * 2


def crossing(error=0.0):
    def decode(feeds):
        tokens, mask = feeds["input_ids"], feeds["encoder_attention_mask"]
        past = feeds.get("past_key_values.0.decoder.key", np.zeros((len(tokens), 0, 6)))
        keys = np.concatenate([past, TABLE[tokens]], axis=1)
        told = (feeds["encoder_hidden_states"] * mask[:, :, None]).sum(1, keepdims=True)
        sums = np.sin(keys.cumsum(1)[:, -tokens.shape[1] :] + told)
        return {LOGITS: sums @ HEAD + error * past.shape[1], "present.0.decoder.key": keys}

    return EncoderDecoder(lambda feeds: {"last_hidden_state": TABLE[feeds["input_ids"]]}, decode, 2)


def test_encoder_decoder_is_not_padded_on_the_right_and_all_it_decodes_counts():
    """Of as many tokens as the prompt, whose padding hides none of them."""
    prompt = crossing().pad(ROWS, 0)
    batch = prompt | {"decoder_input_ids": np.tile(np.arange(12), (3, 1))}
    oracle = row_by_row(recomputing(crossing()))(batch)
    tokens, margins = continue_greedily(crossing(), prompt, 8)
    told = Continuation(prompt, tokens, margins, tokens)
    about = Subject("base", (oracle,), (oracle,), None, {}, told)

    checks = list(judge_generation(about, batch, crossing(), ALLOWED))

    assert [check.case for check in checks] == ["recomputing", "greedy"]
    assert failed(checks) == []
    off = oracle[LOGITS].copy()
    off[2, -1] += 1
    beyond = replace(about, oracle=({LOGITS: off},))
    assert failed(judge_generation(beyond, batch, crossing(), ALLOWED)) == ["recomputing"]


def test_padding_of_a_prompt_hides_nothing_that_an_encoder_decoder_says():
    """Of as many tokens as the prompt in every batch, whose rows are padded."""
    tokens = np.tile(np.arange(12), (3, 1))
    batch = crossing().pad(ROWS, 0) | {"decoder_input_ids": tokens}
    oracle = row_by_row(recomputing(crossing()))(batch)
    about = Subject("base", (oracle,), (oracle,), None, {})

    checks = judge([about], [batch], replaying(crossing()), "float32")

    assert [check.case for check in checks] == ["parity", "padding"]
    assert failed(checks) == []
    off = oracle[LOGITS].copy()
    off[0, -1] += 1  # the shortest prompt, its last token
    beyond = replace(about, oracle=({LOGITS: off},), reference=({LOGITS: off},))
    assert failed(judge([beyond], [batch], replaying(crossing()), "float32")) == [
        "parity", "padding"
    ]  # fmt: skip
