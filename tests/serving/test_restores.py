"""A single file of an artifact comes back from a backup, from another artifact, or is changed.

Whatever comes of it, no answer is one that its version never gave: each is what that adapter gave
under that name in one of the artifact's states, or the request is refused in a line.
"""

import os
import shutil
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.changing import add_adapter, compact_bank, remove_adapter
from propulsion_export.errors import PropulsionExportError
from propulsion_export.serving.session import Session

KINDS = ("switchable", "bank", "compacted")
STATES = range(5)  # the sixth is the one that is there when a file comes back
NAMES = ("base", "three", "five", "acme", "umbrella")
KNOWN = ("base", "three", "five", "acme")  # to the session that is open when a file comes back
TOKENS = np.random.default_rng(0).integers(5, 99, (1, 7))
INPUTS = {"input_ids": TOKENS, "attention_mask": np.ones_like(TOKENS)}


@pytest.fixture(scope="session")
def contents(world, write_adapter, tmp_path_factory):
    """Directories of four adapters with scales of their own."""
    root = tmp_path_factory.mktemp("contents")
    three, chooser = Adapter.read(world.three), np.random.default_rng(1)
    for number in range(4):
        scales = {
            path: Scale(scale.values * chooser.uniform(0.5, 2, scale.values.shape))
            for path, scale in three.scales.items()
        }
        write_adapter(replace(three, scales=scales), root / str(number))
    return [root / str(number) for number in range(4)]


@pytest.fixture(scope="session")
def history(switchable, banked, contents, world, tmp_path_factory):
    """`history(kind)`: an artifact's states one after the other, another artifact, the truth.

    The truth is what a session of each whole state answers: logits by name and version.
    """

    @cache
    def make(kind):
        root = tmp_path_factory.mktemp(kind)
        current = shutil.copytree(switchable if kind == "switchable" else banked, root / "now")
        other = shutil.copytree(current, root / "other")
        steps = [
            lambda: add_adapter(current, f"acme={contents[0]}"),
            lambda: add_adapter(current, f"acme={contents[1]}", force=True),
            lambda: remove_adapter(current, "five"),
            lambda: add_adapter(current, f"five={contents[2]}"),
            lambda: add_adapter(current, f"acme={contents[0]}", force=True),
        ]
        states = []
        for number, step in enumerate(steps):
            states.append(shutil.copytree(current, root / str(number)))
            step()
            if kind == "compacted" and number == 2:
                compact_bank(current)
        for name, content in (("three", contents[3]), ("five", world.three)):
            add_adapter(other, f"{name}={content}", force=True)
        later = shutil.copytree(current, root / "later")
        add_adapter(later, f"umbrella={contents[3]}")
        truth = {}
        for directory in [*states, current, later]:
            truth |= answers(Session(directory))
        return SimpleNamespace(states=states, now=current, other=other, truth=truth)

    return make


@pytest.fixture(params=KINDS)
def past(request, history):
    return history(request.param)


def attempt(action):
    """What it returns, or None where it is refused, in one line."""
    try:
        return action()
    except PropulsionExportError as error:
        refusal = error
    assert "\n" not in str(refusal)
    return None


def answers(session, names=NAMES):
    """Logits by name and version; an adapter that is refused has none."""
    found = {}
    for name in names:
        if replies := attempt(lambda name=name: session(INPUTS, name)):
            found[name, replies[0].version] = replies[0].outputs["logits"]
    return found


def judge(session, past, names=NAMES):
    """How many adapters were answered for; each must be one that its name and version gave.

    A session looks for a name that it does not know on the disk, as `refresh` does.
    """
    found = answers(session, names)
    for who, logits in found.items():
        assert who in past.truth, f"no state has {who}"
        np.testing.assert_allclose(logits, past.truth[who], rtol=1e-5, atol=1e-6, err_msg=str(who))
    return len(found)


def files_of(directory):
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return [str(path.relative_to(directory)) for path in paths]


def write(target, content, how):
    """Replace a file's content, by a rename or in place, and leave its time as it was."""
    before = target.stat() if target.exists() else None
    place = target if how == "in place" else target.with_name(".restored")
    place.write_bytes(content)
    if before is not None:
        os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))
    place.replace(target)


def check_use(directory, file, content, how, past, umbrella):
    """Write one file of a copy of the artifact, and ask whoever may be asked."""
    shutil.copytree(past.now, directory)
    session = Session(directory)
    assert judge(session, past) == 4
    write(directory / file, content, how)
    asked = judge(session, past, KNOWN)
    fresh = attempt(lambda: Session(directory))
    if fresh is not None:
        judge(fresh, past)
    attempt(session.refresh)
    judge(session, past)
    attempt(lambda: add_adapter(directory, f"umbrella={umbrella}"))
    for each in filter(None, (session, fresh)):
        judge(each, past, ("base", *each.adapters))
        attempt(each.refresh)
        judge(each, past)
    if last := attempt(lambda: Session(directory)):
        judge(last, past)
    shutil.rmtree(directory)
    return asked


@pytest.mark.parametrize("how", ["renamed", "in place"])
@pytest.mark.parametrize("state", STATES)
def test_a_file_of_an_earlier_state_is_right_or_refused(past, state, how, contents, tmp_path):
    restored, differ = past.states[state], 0
    for file in files_of(restored):
        content = (restored / file).read_bytes()
        if (past.now / file).exists() and (past.now / file).read_bytes() == content:
            continue
        asked = check_use(tmp_path / "used", file, content, how, past, contents[3])
        differ += 1
        assert asked == 4 or (how, file[:13]) == ("in place", "adapters/bank")
    assert differ > 0


@pytest.mark.parametrize("how", ["renamed", "in place"])
def test_a_file_of_another_artifact_is_right_or_refused(past, how, contents, tmp_path):
    differ = 0
    for file in files_of(past.other):
        content = (past.other / file).read_bytes()
        if (past.now / file).exists() and (past.now / file).read_bytes() == content:
            continue
        check_use(tmp_path / "used", file, content, how, past, contents[3])
        differ += 1
    assert differ > 0


def test_any_file_that_is_changed_in_place_is_right_or_refused(past, contents, tmp_path):
    for file in files_of(past.now):
        content = np.frombuffer((past.now / file).read_bytes(), np.uint8)
        if content.size:
            changed = (content ^ 1).tobytes()
            check_use(tmp_path / "used", file, changed, "in place", past, contents[3])


def test_every_state_has_answers_of_its_own(past):
    """Else a wrong answer would not be noticed."""
    logits = np.concatenate([each[:3][None] for each in past.truth.values()])
    names = [name for name, _ in past.truth]
    assert sorted(names) == ["acme", "acme", "base", "five", "five", "three", "umbrella"]
    apart = np.abs(logits[:, None] - logits[None]).max(-1)
    np.fill_diagonal(apart, np.inf)
    assert apart.min() > 1e-3


def test_a_tenant_is_not_answered_with_the_row_of_the_next_one(history, contents, tmp_path):
    """Yesterday's registry beside today's rows, then one more tenant: the row was written over."""
    past = history("bank")
    directory = shutil.copytree(past.now, tmp_path / "artifact")
    session = Session(directory)
    before = answers(session, KNOWN)
    registry = past.states[0] / "adapters/registry.sqlite"
    write(directory / "adapters/registry.sqlite", registry.read_bytes(), "renamed")

    for number in (3, 1, 1, 1):
        add_adapter(directory, f"umbrella={contents[number]}", force=True)

    after = answers(session, KNOWN)
    assert after.keys() == before.keys()
    for who, logits in before.items():
        np.testing.assert_array_equal(after[who], logits)
    session.refresh()
    assert session.adapters == ("five", "three", "umbrella")
