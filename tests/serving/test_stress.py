"""All at once: 16 threads ask while adapters, links, forks and killed processes come and go.

Each answer names its version. A fresh session of a release says what that version computes; any
other pair is wrong. What a process that is gone would hold up is timed.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import pytest
from forks import forking
from releases import exchange_words

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts import locking
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.bank import Bank
from propulsion_export.artifacts.changing import add_adapter, compact_bank
from propulsion_export.artifacts.tensor_names import SCALES_INPUT
from propulsion_export.errors import ArtifactError, UnknownAdapterError, UsageError
from propulsion_export.serving import session as session_module
from propulsion_export.serving.session import Session

THREADS = 16
CONTENTS = 6
NAMES = ("x0", "x1", "x2")  # come and go by the session
KILLED = ("k0", "k1", "k2")  # come by processes that are killed
STEADY = ("three", "five", "base")
WORDS = ("ba", "be", "bi", "ko", "do", "re", "mi", "fa", "la", "ti")
# Each has one of the two words that the tokenizer of another model swaps.
TEXTS = [f"{('ba', 'be')[n % 2]} {' '.join(WORDS[2 : 2 + n % 8])}" for n in range(16)]
ALLOWED = 2e-5  # for the padding of other rows
IDLE = 3.0  # seconds that a forked child lives: what it held would be missed for as long
LONGEST = 1.0  # seconds that a process that is gone may hold anything up
pytestmark = pytest.mark.usefixtures("many_turns")


@dataclass(frozen=True)
class Table:
    """What fresh sessions of a model answer: by version, logits of each text."""

    logits: dict

    @classmethod
    def of(cls, release, contents, root):
        copy = shutil.copytree(release, root / f"all-of-{release.name}")
        for number, content in enumerate(contents):
            add_adapter(copy, f"c{number}={content}")
        session, found = Session(copy), {}
        for name in ("base", *(f"c{number}" for number in range(len(contents)))):
            replies = [session(text, name)[0] for text in TEXTS]
            found[replies[0].version] = [reply.outputs["logits"] for reply in replies]
        return cls(found)

    def judge(self, rows, replies):
        """What is wrong with the replies to a request for these texts, in words."""
        found, versions = [], {}
        for row, reply in zip(rows, replies, strict=True):
            right, logits = self.logits.get(reply.version), reply.outputs["logits"]
            if right is None:
                found.append(f"{reply.adapter}: no release has its version {reply.version}")
            elif logits.shape != right[row].shape or not (
                np.abs(logits - right[row]).max() <= ALLOWED
            ):
                found.append(f"{reply.adapter}: not what its version computes")
            if versions.setdefault(reply.adapter, reply.version) != reply.version:
                found.append(f"{reply.adapter}: two versions in one request")
        return found


class Site:
    """Three releases, of which two are of one model, and a link to one of them."""

    def __init__(self, artifact, contents, root):
        self.link, self.contents = root / "current", contents
        self.releases = [root / f"release-{number}" for number in (1, 2, 3)]
        for release in self.releases:
            shutil.copytree(artifact, release)
        add_adapter(self.releases[1], f"three={contents[2]}", force=True)
        make_other(self.releases[2], contents)
        self.same, self.other = (
            Table.of(self.releases[number], contents, root) for number in (0, 2)
        )
        self.point(0)

    def point(self, number):
        aside = self.link.with_name("next")
        aside.symlink_to(self.releases[number])
        aside.replace(self.link)


def make_other(release, contents):
    """Make it a release of another model: two words, and two modules' scales, change places."""
    manifest = Artifact.read(release).manifest
    exchange_words(release)
    slots = {slot.path: slot for slot in manifest.layout[SCALES_INPUT]}
    query, value = (
        f"bert.encoder.layer.0.attention.self.{module}" for module in ("query", "value")
    )
    other = {query: value, value: query}
    layout = tuple(replace(s, path=other.get(path, path)) for path, s in slots.items())
    Artifact.write(release, replace(manifest, layout={**manifest.layout, SCALES_INPUT: layout}))
    for name, content in zip(STEADY[:2], contents[:2], strict=True):
        add_adapter(release, f"{name}={content}", force=True)


@pytest.fixture(scope="session")
def contents(world, shared, write_adapter):
    """Directories of adapters that a name may have."""

    def fill(root):
        for seed in range(2, CONTENTS):
            adapter = Adapter.read((world.three, world.five)[seed % 2])
            chooser = np.random.default_rng(seed)
            scales = {
                path: Scale(scale.values * chooser.uniform(0.5, 1.5, scale.values.shape))
                for path, scale in adapter.scales.items()
            }
            labels = tuple(f"{seed}-{index}" for index in range(len(adapter.labels)))
            write_adapter(replace(adapter, scales=scales, labels=labels), root / f"content{seed}")

    root = shared("stress-contents", fill)
    made = [root / f"content{seed}" for seed in range(2, CONTENTS)]
    return [world.three, world.five, *made]


@pytest.fixture
def site(switchable, banked, contents, tmp_path):
    places = {"switchable": switchable, "banked": banked}
    return lambda kind: Site(places[kind], contents, tmp_path)


class Stress:
    """Everything that goes on at the same time, until `end()`.

    Attributes:
        wrong: what must not happen, in words.
        told: how often what happened.
        waits: seconds that a lock took of which no process that lives was the owner.
    """

    def __init__(self, site):
        self.site, self.session = site, Session(site.link)
        self.wrong, self.told, self.waits = [], Counter(), []
        self._over, self._counting = threading.Event(), threading.Lock()
        roles = [self._change, self._repoint, self._open, self._fork, self._kill]
        self._threads = [
            *(threading.Thread(target=self._guarded, args=(self._ask, n)) for n in range(THREADS)),
            *(threading.Thread(target=self._guarded, args=(r, 99)) for r in roles),
        ]

    def run(self, seconds, answers):
        """Go on for so many seconds, and until there are so many answers of all kinds."""
        begun = time.monotonic()
        for thread in self._threads:
            thread.start()
        try:
            while not self.wrong and not self._enough(time.monotonic() - begun, seconds, answers):
                time.sleep(0.2)
        finally:
            self._over.set()
            for thread in self._threads:
                thread.join()

    def _enough(self, gone, seconds, answers):
        if gone > max(3 * seconds, 120):
            self.wrong.append(f"too little happened: {dict(self.told)}")
        kinds = ("added", "removed", "followed", "refused", "opened", "forked", "killed")
        happened = all(self.told[kind] > 2 for kind in kinds)
        return gone > seconds and self.told["answers"] >= answers and happened

    def _guarded(self, role, seed):
        try:
            role(np.random.default_rng(seed))
        except Exception as error:
            self.wrong.append(f"{role.__name__}: {error!r}")

    def _count(self, what, by=1):
        with self._counting:
            self.told[what] += by

    def _ask(self, chooser):
        while not self._over.is_set():
            self._request(self.session, chooser, [self.site.same])

    def _request(self, session, chooser, tables):
        """Ask for some texts; the answers must be those of one model."""
        rows = chooser.integers(0, len(TEXTS), chooser.integers(1, 9)).tolist()
        names = chooser.choice([*NAMES, *KILLED, *STEADY * 6], len(rows)).tolist()
        try:
            replies = session([TEXTS[row] for row in rows], names)
        except UnknownAdapterError as error:
            self._count("unknown")
            if any(f"has no adapter '{name}'" in str(error) for name in STEADY):
                self.wrong.append(str(error))
        else:
            found = [table.judge(rows, replies) for table in tables]
            self.wrong += min(found, key=len)
            self._count("answers", len(replies))

    def _change(self, chooser):
        """Add, replace and remove by the session; where it refuses, follow the link."""
        while not self._over.wait(0.01):
            name = str(chooser.choice(NAMES))
            content = self.site.contents[chooser.integers(CONTENTS)]
            try:
                if name in self.session.adapters and chooser.random() < 0.3:
                    self.session.remove(name)
                    self._count("removed")
                else:
                    self.session.add(f"{name}={content}", force=True)
                    self._count("added")
            except UnknownAdapterError:
                pass  # it went over to a release without it
            except UsageError as error:
                self._expect("is another directory now", error)
                self._count("refused")
                self._follow()
            if chooser.random() < 0.02 and self.session._artifact.manifest.mode == "bank":
                compact_bank(self.site.releases[chooser.integers(2)])
                self._count("compacted")

    def _follow(self):
        try:
            self.session.refresh()
            self._count("followed")
        except ArtifactError as error:
            self._expect("is another model than", error)
            self._count("another model")

    def _expect(self, message, error):
        if message not in str(error):
            self.wrong.append(repr(error))

    def _repoint(self, chooser):
        while not self._over.wait(chooser.uniform(0, 0.1)):
            self.site.point(chooser.integers(3))
            if chooser.random() < 0.5:
                self._follow()

    def _open(self, chooser):
        """Open a session of whatever the link leads to, and ask it."""
        while not self._over.wait(0.05):
            session = Session(self.site.link)
            for _ in range(3):
                self._request(session, chooser, [self.site.same, self.site.other])
            self._count("opened")

    def _fork(self, chooser):
        """Keep forked children that do nothing, as a data loader or a server's worker would."""
        children = []
        while not self._over.wait(chooser.uniform(0.05, 0.3)):
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            children.append((time.monotonic(), child))
            self._count("forked")
            while children[0][0] < time.monotonic() - IDLE:
                end(children.pop(0)[1])
        for _, child in children:
            end(child)

    def _kill(self, chooser):
        """Kill processes while they add, and see that nothing stays locked."""
        following = self._adder(0)
        try:
            for number in range(1, 100_000):
                adder, following = following, self._adder(number)
                with adder:
                    adder.stdin.write("go\n")
                    adder.stdin.flush()
                    self._over.wait(chooser.uniform(0.05, 0.5))
                    ended = adder.poll()
                    adder.kill()
                    if ended is not None:
                        self.wrong.append(adder.stderr.read())
                self._count("killed")
                self.waits += map(time_lock, self.site.releases[:2])
                if self._over.is_set():
                    return
        finally:
            with following:
                following.kill()

    def _adder(self, number):
        adder = subprocess.Popen(
            [sys.executable, "-c", ADDER, str(number), *map(str, self.site.releases[:2])]
            + [str(content) for content in self.site.contents],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert adder.stdout.readline() == "begun\n"
        return adder


ADDER = """
import sys
from propulsion_export import add_adapter

number, first, second, *contents = sys.argv[1:]
import propulsion_export.artifacts.changing
print("begun", flush=True)
sys.stdin.readline()
for turn in range(int(number), 10**9):
    release, content = (first, second)[turn % 2], contents[turn % len(contents)]
    add_adapter(release, f"k{turn % 3}={content}", force=True)
"""


def end(child):
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def time_lock(release):
    """Seconds until a release can be changed, and its adapters read."""
    begun = time.monotonic()
    with locking.exclusive_lock(release):
        if (release / "adapters/registry.sqlite").exists():
            Bank.open(release).rows()
    return time.monotonic() - begun


def put_under_stress(site, seconds, answers):
    stress = Stress(site)
    begun = time.monotonic()
    stress.run(seconds, answers)
    print(  # shown with -s
        f"{dict(stress.told)} in {time.monotonic() - begun:.0f} s, the longest wait "
        f"{max(stress.waits):.2f} s, wrong {len(stress.wrong)}"
    )
    assert stress.wrong == []
    assert max(stress.waits) < LONGEST
    for release in site.releases[:2]:
        session = Session(release)
        for name in session.adapters:
            assert site.same.judge(range(len(TEXTS)), session(TEXTS, name)) == []


both = pytest.mark.parametrize("kind", ["banked", "switchable"])


@both
def test_a_wrong_answer_would_be_noticed(kind, site):
    """No two versions, texts or models could be taken for each other."""
    made = site(kind)
    session = Session(made.releases[0])
    three, five = session(TEXTS, "three"), session(TEXTS, "five")
    rows = range(len(TEXTS))

    assert made.same.judge(rows, three) == []
    assert len(made.other.judge(rows, three)) == len(TEXTS)
    assert len(made.same.judge(rows, [three[1], *three[1:]])) == 1
    assert len(made.same.judge([0], [replace(three[0], version=five[0].version)])) == 1
    answers = [
        (logits[0][:3], number, version)
        for number, table in enumerate((made.same, made.other))
        for version, logits in table.logits.items()
    ]
    for index, (logits, *_) in enumerate(answers):
        for other, *_ in answers[index + 1 :]:
            assert np.abs(logits - other).max() > 10 * ALLOWED


@forking
def test_a_session_that_goes_over_to_another_model_would_be_noticed(site, monkeypatch):
    monkeypatch.setattr(session_module, "check_same_model", lambda *_: None)
    stress = Stress(site("banked"))

    stress.run(60, 10**9)

    assert "not what its version computes" in stress.wrong[0]


@forking
@both
def test_every_answer_is_one_that_a_fresh_session_gives(kind, site):
    put_under_stress(site(kind), 30, 3_000)


@forking
@pytest.mark.slow
@both
def test_ten_minutes_and_a_hundred_thousand_answers(kind, site):
    put_under_stress(site(kind), 300, 50_000)
