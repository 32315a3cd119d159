"""An adapter after every other gives what it gave before; state that stays anywhere is caught."""

from itertools import pairwise

import numpy as np
import pytest

from propulsion_export.artifacts.manifest import TensorSpec
from propulsion_export.artifacts.tensor_names import LOGITS
from propulsion_export.parity.matrix.probe import Probe
from propulsion_export.parity.matrix.switching import check_switching
from propulsion_export.parity.subject import Subject
from propulsion_export.runners.decoding import CausalModel, pad_left

SCALES = {"one": 2.0, "two": -1.0, "three": 0.5}
CHOOSER = np.random.default_rng(1)
VOCABULARY = 13
TABLE, HEAD = CHOOSER.normal(size=(VOCABULARY, 6)), CHOOSER.normal(size=(6, VOCABULARY))
INPUTS = (TensorSpec("past_key_values.0.key", "float64", ("batch", 1, "past_sequence", 6)),)


def states(*names):
    feeds = {name: {"scales": np.array([SCALES[name]])} for name in names if name != "base"}
    return [Subject(name, (), (), None, feeds.get(name, {})) for name in names]


def scaled(feeds):
    return {"y": feeds["x"] * feeds.get("scales", 1.0)}


def step(feeds):
    """A decoding step: logits of the running sum of scaled tokens."""
    new = TABLE[feeds["input_ids"]] * feeds.get("scales", np.ones(1))[0]
    keys = np.concatenate([np.asarray(feeds["past_key_values.0.key"])[:, 0], new], axis=1)
    sums = np.sin(keys.cumsum(1))[:, -new.shape[1] :]
    return {LOGITS: sums @ HEAD, "present.0.key": keys[:, None]}


def judged(candidate, *names):
    batch = {"x": np.ones((2, 3))}
    if not callable(candidate):
        batch = pad_left([np.array([1, 2, 3]), np.array([4, 5, 6])], 0)
    probe, subjects = Probe(batch, candidate), states(*names)
    before = {subject.name: probe.run(subject.feeds) for subject in subjects}
    return list(check_switching(subjects, probe, before))


def verdicts(checks):
    return {check.adapter: check.passed for check in checks}


@pytest.mark.parametrize("candidate", [scaled, CausalModel(step, INPUTS)])
def test_a_candidate_without_memory_passes_with_every_adapter(candidate):
    checks = judged(candidate, "one", "two", "three", "base")

    assert verdicts(checks) == {"one": True, "two": True, "three": True}
    assert checks[0].detail.startswith("after three and after base and these after it: bit for bit")


def test_one_adapter_alone_has_nothing_to_be_switched_with():
    assert judged(scaled, "one") == []


def leaking(by, *, after):
    """A candidate that adds a little to what follows an adapter."""
    last = []

    def run(feeds):
        scale = float(feeds.get("scales", [1.0])[0])
        stale = bool(last) and last[-1] == after and scale != after
        last.append(scale)
        return {"y": scaled(feeds)["y"] + by * stale}

    return run


@pytest.mark.parametrize("after", ["one", "two", "three"])
def test_what_stays_of_any_adapter_is_caught(after):
    """Only the first and the last state were exchanged once: what stays of `two` passed."""
    checks = judged(leaking(1e-12, after=SCALES[after]), "one", "two", "three", "base")

    assert not all(verdicts(checks).values())


def test_what_stays_of_the_base_model_is_caught_in_every_adapter():
    checks = judged(leaking(1e-12, after=1.0), "one", "two", "base")

    assert verdicts(checks) == {"one": False, "two": False}
    assert "one after base: y changed" in checks[0].detail


class OwnCache:
    """A runtime that reads the cache it wrote last, whichever it is fed."""

    def __init__(self):
        self.last = None

    def __call__(self, feeds):
        if feeds["past_key_values.0.key"].shape[2] > 0:
            feeds = {**feeds, "past_key_values.0.key": self.last}
        found = step(feeds)
        self.last = found["present.0.key"]
        return found


def test_a_cache_that_another_generation_writes_is_caught_only_in_turns():
    checks = judged(CausalModel(OwnCache(), INPUTS), "one", "base")

    assert verdicts(checks) == {"one": False}
    findings = checks[0].detail.split("; ")
    assert all("in turns" in finding for finding in findings)


def test_a_cache_that_is_not_emptied_is_caught():
    kept = []

    def run(feeds):
        if feeds["past_key_values.0.key"].shape[2] == 0 and kept:
            feeds = {**feeds, "past_key_values.0.key": kept[-1]}
        found = step(feeds)
        kept.append(found["present.0.key"])
        return found

    assert not any(verdicts(judged(CausalModel(run, INPUTS), "one", "two")).values())


def test_every_adapter_runs_after_its_neighbour_and_after_the_base_model():
    ran = []

    def run(feeds):
        ran.append(float(feeds.get("scales", [1.0])[0]))
        return scaled(feeds)

    judged(run, "one", "two", "three", "base")

    after = set(pairwise(ran))
    assert {(SCALES["three"], SCALES["one"]), (SCALES["one"], SCALES["two"])} <= after
    assert {(1.0, scale) for scale in SCALES.values()} <= after
    assert {(scale, 1.0) for scale in SCALES.values()} <= after
