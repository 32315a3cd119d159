"""Mixed rows are judged each by its own adapter, so that no mix-up passes."""

import numpy as np
import pytest

from propulsion_export.artifacts.manifest import TensorSpec
from propulsion_export.artifacts.tensor_names import BANK_INPUT, IDS_INPUT, LOGITS
from propulsion_export.parity.generation import continue_greedily
from propulsion_export.parity.mixing import mixed_generation, mixed_rows
from propulsion_export.parity.subject import Continuation, Subject
from propulsion_export.runners.decoding import CausalModel, pad_left

BANK = np.array([[1.0, 1.0], [2.0, -1.0], [0.5, 3.0]])
NAMES = ("base", "one", "two")
ALLOWED = {name: {"y": 1e-6} for name in NAMES}


def batch(rows, seed):
    chooser = np.random.default_rng(seed)
    return {
        "input_ids": chooser.integers(0, 9, (rows, 3)),
        "attention_mask": np.array([[1, 1, 0]] * rows),
    }


INPUTS = [batch(4, 0), batch(4, 1)]


def compute(feeds):
    """y [batch, 3, 2]: every token times the row's two scales."""
    ids = np.broadcast_to(feeds[IDS_INPUT], len(feeds["input_ids"]))
    return {"y": feeds["input_ids"][..., None] * feeds[BANK_INPUT][ids][:, None]}


def subjects():
    made = []
    for number, name in enumerate(NAMES):
        feeds = {BANK_INPUT: BANK, IDS_INPUT: np.array([number])}
        oracle = tuple(compute({**each, **feeds}) for each in INPUTS)
        made.append(Subject(name, oracle, oracle, None, feeds))
    return made


def judged(candidate, inputs=INPUTS, allowed=ALLOWED):
    return mixed_rows(subjects(), inputs, candidate, allowed)


def test_the_right_rows_pass_and_are_bit_for_bit():
    check = judged(compute)

    assert check.passed
    assert "0.0% of the allowed error; bit for bit" in check.detail


def first_for_all(feeds):
    return compute({**feeds, IDS_INPUT: feeds[IDS_INPUT][:1]})


def neighbours(feeds):
    return compute({**feeds, IDS_INPUT: np.roll(feeds[IDS_INPUT], 1)})


def nan_in_mixed_batches(feeds):
    found = compute(feeds)
    if len(set(feeds[IDS_INPUT].tolist())) > 1:
        found["y"][-1, 0, 0] = np.nan
    return found


@pytest.mark.parametrize("mistaken", [first_for_all, neighbours, nan_in_mixed_batches])
def test_a_mix_up_fails(mistaken):
    assert not judged(mistaken).passed


def by_position(feeds):
    """A row's adapter follows from its place: right where adapters come in turn."""
    rows = len(feeds["input_ids"])
    return compute(
        {**feeds, IDS_INPUT: np.arange(rows) % 2 if in_mixed(feeds) else feeds[IDS_INPUT]}
    )


def first_four_again(feeds):
    """Ids of the fifth row and later are those of the first again."""
    ids = np.broadcast_to(feeds[IDS_INPUT], len(feeds["input_ids"]))
    return compute({**feeds, IDS_INPUT: ids[np.arange(len(ids)) % 4]})


def base_for_a_single_row(feeds):
    return compute({**feeds, IDS_INPUT: feeds[IDS_INPUT] * (len(feeds["input_ids"]) > 1)})


def the_same_adapter_is_forgotten(feeds):
    same = len(feeds[IDS_INPUT]) > 1 and len(set(feeds[IDS_INPUT].tolist())) == 1
    return compute({**feeds, IDS_INPUT: feeds[IDS_INPUT] - same})


def one_row_for_many(feeds):
    found = compute(feeds)
    return {"y": found["y"][:4]}


def in_mixed(feeds):
    return len(set(feeds[IDS_INPUT].tolist())) > 1


@pytest.mark.parametrize(
    ("mistaken", "words"),
    [
        (by_position, "in another order"),
        (first_four_again, "more rows than adapters, each twice"),
        (base_for_a_single_row, "a single row"),
        (the_same_adapter_is_forgotten, "one in all rows"),
        (one_row_for_many, "more rows than adapters, each twice"),
    ],
)
def test_a_mix_up_that_batches_in_turn_do_not_show_fails(mistaken, words):
    """Of two states in batches of four rows, the second in every other row."""
    two = [subject for subject in subjects() if subject.name != "base"]

    check = mixed_rows(two, INPUTS, mistaken_ids_from_one(mistaken), ALLOWED)

    assert not check.passed
    assert check.detail.endswith(f"worst: {words}")


def mistaken_ids_from_one(mistaken):
    """The mistake among the rows of `one` and `two`, whose numbers are 1 and 2."""

    def run(feeds):
        return mistaken({**feeds, BANK_INPUT: BANK[1:], IDS_INPUT: feeds[IDS_INPUT] - 1})

    return run


def test_an_engine_gets_no_more_rows_than_it_takes():
    counts = []

    def watched(feeds):
        counts.append(len(feeds["input_ids"]))
        return compute(feeds)

    assert mixed_rows(subjects(), INPUTS, watched, ALLOWED, most=5).passed
    assert max(counts) == 5


def test_another_rounding_among_others_passes_and_is_told():
    def rounded(feeds):
        found = compute(feeds)
        return {"y": found["y"] + (5e-7 if len(feeds[IDS_INPUT]) > 1 else 0)}

    check = judged(rounded)

    assert check.passed
    assert "50.0% of the allowed error; not bit for bit" in check.detail


def test_what_the_mask_hides_does_not_count():
    def noisy(feeds):
        found = compute(feeds)
        found["y"][:, 2] += len(feeds[IDS_INPUT]) - 1
        return found

    assert judged(noisy).passed


def test_every_adapter_has_a_row_even_when_there_are_more_than_rows():
    seen = set()

    def watched(feeds):
        if len(feeds[IDS_INPUT]) > 1:
            seen.update(feeds[IDS_INPUT].tolist())
        return compute(feeds)

    few = [batch(2, 0)]
    three = [
        Subject(s.name, (compute({**few[0], **s.feeds}),), (), None, s.feeds) for s in subjects()
    ]

    assert mixed_rows(three, few, watched, ALLOWED).passed
    assert seen == {0, 1, 2}


def test_an_adapter_that_returned_nothing_to_judge_is_left_out():
    check = judged(compute, allowed={name: ALLOWED[name] for name in ("base", "two")})

    assert check.passed


VOCABULARY, STEPS = 13, 20
CHOOSER = np.random.default_rng(2)
TABLE, HEAD = CHOOSER.normal(size=(VOCABULARY, 6)), CHOOSER.normal(size=(6, VOCABULARY))
SPECS = (TensorSpec("past_key_values.0.key", "float64", ("batch", 1, "past_sequence", 6)),)
PROMPT = pad_left([CHOOSER.integers(1, VOCABULARY, 4) for _ in range(3)], 0)


def step(feeds):
    """A decoding step whose logits depend on both scales of the row."""
    ids = np.broadcast_to(feeds[IDS_INPUT], len(feeds["input_ids"]))
    new = TABLE[feeds["input_ids"]] * np.repeat(feeds[BANK_INPUT][ids], 3, axis=1)[:, None]
    keys = np.concatenate([np.asarray(feeds["past_key_values.0.key"])[:, 0], new], axis=1)
    return {LOGITS: np.sin(3 * keys.cumsum(1))[:, -new.shape[1] :] @ HEAD,
            "present.0.key": keys[:, None]}  # fmt: skip


def generating():
    made = []
    for number, name in enumerate(NAMES):
        feeds = {BANK_INPUT: BANK, IDS_INPUT: np.array([number])}
        tokens, margins = continue_greedily(CausalModel(step, SPECS), {**PROMPT, **feeds}, STEPS)
        made.append(
            Subject(name, (), (), None, feeds, Continuation(PROMPT, tokens, margins, tokens))
        )
    return made


def generated(run, bound=1e-9):
    allowed = {name: {LOGITS: bound} for name in NAMES}
    return mixed_generation(generating(), CausalModel(run, SPECS), allowed)


def test_mixed_rows_generate_what_they_generate_alone():
    check = generated(step)

    assert check.passed
    assert check.detail == "16 tokens behind 3 mixed prompts are as alone"


def test_rows_that_change_places_with_the_cache_fail():
    def rolled(feeds):
        later = feeds["past_key_values.0.key"].shape[2] > 0
        return step({**feeds, IDS_INPUT: np.roll(feeds[IDS_INPUT], int(later))})

    check = generated(rolled)

    assert not check.passed
    assert "from what it generates alone" in check.detail
    assert "no tie" in check.detail


def test_tokens_that_part_at_a_tie_pass():
    def other_at_the_end(feeds):
        found = step(feeds)
        if feeds["attention_mask"].shape[1] > 8:
            found[LOGITS][0, -1] = -found[LOGITS][0, -1]
        return found

    assert generated(other_at_the_end, bound=100.0).passed
    assert not generated(other_at_the_end).passed


def test_logits_that_are_not_finite_in_mixed_rows_fail():
    def broken(feeds):
        found = step(feeds)
        found[LOGITS][1] *= np.nan
        return found

    check = generated(broken, bound=100.0)

    assert not check.passed
    assert check.detail.startswith("logits are not finite")
