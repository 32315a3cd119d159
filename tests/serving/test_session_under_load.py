"""Eight threads ask while adapters come, go and are replaced: every answer is judged by itself.

Each reply names the version that it was computed with. PyTorch with that adapter attached, in
float64, says what it must be; how far off it may be is what PyTorch is off in float32. The versions
are further apart than that by orders of magnitude: a row of another, or a mixture, shows.
"""

import gc
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.errors import UnknownAdapterError
from propulsion_export.parity.comparison import FACTOR
from propulsion_export.serving.session import Session

THREADS, POOL, LENGTH = 8, 16, 6
CONTENTS = 6
NAMES = ("x0", "x1", "x2", "x3")  # come and go
STEADY = ("three", "five", "base")
MEGABYTE = 2**20
pytestmark = pytest.mark.usefixtures("many_turns")


@dataclass
class Oracle:
    """What must come out: by version, logits [16, labels] of each row of the pool."""

    inputs: dict
    logits: dict
    allowed: float

    def judge(self, rows, replies):
        """What is wrong with the replies to a request for these rows of the pool, in words."""
        found, versions = [], {}
        for row, reply in zip(rows, replies, strict=True):
            exact = self.logits.get(reply.version)
            if exact is None:
                found.append(f"{reply.adapter}: nobody knows its version {reply.version}")
            elif reply.outputs["logits"].shape != exact[row].shape:
                found.append(f"{reply.adapter}: {len(reply.outputs['logits'])} labels")
            elif not np.abs(reply.outputs["logits"] - exact[row]).max() <= self.allowed:
                found.append(f"{reply.adapter}: not what its version computes")
            if versions.setdefault(reply.adapter, reply.version) != reply.version:
                found.append(f"{reply.adapter}: two versions in one request")
        return found


@pytest.fixture(scope="session")
def contents(world, shared, tiny_model, positive_adapter, write_adapter):
    """Directories of adapters that the names may have, of 3 and 5 labels in turn."""

    def fill(root):
        from transformers import AutoModel

        from propulsion_export.base_model.model_fingerprint import fingerprint_of_model

        fingerprint = fingerprint_of_model(AutoModel.from_pretrained(world.base))
        for seed in own:
            count = (3, 5)[seed % 2]
            model = tiny_model("bert", num_labels=count, id2label=None, label2id=None)
            adapter = positive_adapter(
                model, 10 + seed, f"content{seed}", head=True, biases=count == 3,
                labels=tuple(f"{seed}-{index}" for index in range(count)),
                task="text-classification",
            )  # fmt: skip
            adapter = replace(adapter, base=str(world.base), fingerprint=fingerprint)
            write_adapter(adapter, root / f"content{seed}")

    own = range(2, CONTENTS)
    root = shared("contents", fill)
    return [world.three, world.five, *(root / f"content{seed}" for seed in own)]


@pytest.fixture(scope="session")
def oracle(world, contents, banked, switchable, shared):
    tokens = np.random.default_rng(0).integers(5, 99, (POOL, LENGTH))
    inputs = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    inputs["token_type_ids"] = np.zeros_like(tokens)
    adapters = {}
    for directory in contents:
        adapter = Adapter.read(directory)
        adapters[adapter.digest] = adapter
    for artifact in (banked, switchable):
        # The base model has the head of the first adapter, for lack of one of its own.
        version = Session(artifact)(inputs)[0].version
        adapters[version] = replace(Adapter.read(world.three), scales={}, biases={})

    def fill(directory):
        for number, adapter in enumerate(adapters.values()):
            np.savez(directory / f"{number}.npz", **by_pytorch(world.base, adapter, inputs))

    logits, errors = {}, []
    for number, version in enumerate(adapters):
        with np.load(shared("contents-oracle", fill) / f"{number}.npz") as found:
            logits[version] = found["float64"]
            errors.append(np.abs(found["float32"] - found["float64"]).max())
    return Oracle(inputs, logits, FACTOR * max(errors))


def by_pytorch(base, adapter, inputs):
    """The logits by dtype."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from propulsion_export.runners.pytorch import torch_runner
    from propulsion_export.scaling.attach import attached

    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(adapter.labels)
    ).eval()
    found = {}
    for dtype in ("float64", "float32"):
        with attached(model.to(getattr(torch, dtype)), adapter):
            found[dtype] = torch_runner(model)(inputs)["logits"]
    return found


def test_no_two_versions_could_be_taken_for_each_other(oracle, contents):
    """Nor a row for another: else the judge below could not tell."""
    exact = [logits[:, :3] for logits in oracle.logits.values()]
    assert len(exact) == len(contents) + 2  # base models of two artifacts, which are alike
    np.testing.assert_array_equal(exact[-1], exact[-2])

    answers = np.concatenate(exact[:-1])
    apart = np.abs(answers[:, None] - answers[None]).max(-1)
    np.fill_diagonal(apart, np.inf)
    assert apart.min() > 100 * oracle.allowed


def owned():
    """Bytes of memory of this process alone; pages of files, such as the bank, do not count."""
    with open("/proc/self/status") as status:  # noqa: PTH123
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


class Load:
    """Threads that ask, at least until `enough()`, and what is wrong with the answers."""

    def __init__(self, session, oracle, requests, enough=lambda: True, *, measured=False):
        self.session, self.oracle, self.requests = session, oracle, requests
        self.enough, self.measured = enough, measured
        self.wrong, self.memory = [], []
        self.told = Counter()
        self.versions = set()
        self.made = 0
        self._lock = threading.Lock()

    def run(self):
        """Ask until all requests are made; returns the seconds that took."""
        threads = [threading.Thread(target=self._ask, args=(seed,)) for seed in range(THREADS)]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - begun

    def _ask(self, seed):
        chooser = np.random.default_rng(seed)
        while self._take():
            rows = chooser.integers(0, POOL, chooser.integers(1, 9)).tolist()
            names = chooser.choice([*NAMES, *STEADY], len(rows)).tolist()
            inputs = {name: values[rows] for name, values in self.oracle.inputs.items()}
            try:
                replies = self.session(inputs, names)
            except UnknownAdapterError as error:
                self._unknown(str(error), names)
            except Exception as error:
                self.wrong.append(repr(error))
            else:
                self.wrong += self.oracle.judge(rows, replies)
                self.told["answered"] += 1
                self.versions |= {(r.adapter, r.version) for r in replies}

    def _take(self):
        with self._lock:
            if self.measured and self.made % (self.requests // 12) == 0:
                gc.collect()
                self.memory.append(owned())
            if self.made >= self.requests and self.enough():
                return False
            self.made += 1
            return True

    def _unknown(self, message, names):
        """Names that come and go may be gone; nothing else may."""
        self.told["unknown"] += 1
        if not any(f"has no adapter '{name}'" in message for name in NAMES if name in names):
            self.wrong.append(message)


class Changes:
    """A thread that adds, replaces and removes adapters until it is told to end."""

    def __init__(self, session, contents):
        self.made, self.wrong, self._over = Counter(), [], threading.Event()
        self._arguments = session, contents
        self._thread = threading.Thread(target=self._change)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def enough(self):
        """Whether there was some of everything, or something is wrong."""
        kinds = ("added", "replaced", "removed")
        return self.wrong or min(self.made[kind] for kind in kinds) > 2

    def _change(self):
        session, contents = self._arguments
        chooser = np.random.default_rng(99)
        while not self._over.is_set():
            name, content = chooser.choice(NAMES), contents[chooser.integers(len(contents))]
            try:
                if name in session.adapters and chooser.random() < 0.3:
                    session.remove(name)
                    self.made["removed"] += 1
                else:
                    self.made["replaced" if name in session.adapters else "added"] += 1
                    session.add(f"{name}={content}", force=True)
                if session._artifact.manifest.mode == "bank" and chooser.random() < 0.02:
                    session._artifact.open_bank().compact()
                    session.refresh()
                    self.made["compacted"] += 1
            except Exception as error:
                # Another process may have removed it first.
                if "has no adapter" not in str(error):
                    self.wrong.append(repr(error))


OTHER = """
import sys, threading
from pathlib import Path
from propulsion_export import add_adapter, remove_adapter
from propulsion_export.errors import UsageError

directory, *contents = map(Path, sys.argv[1:])
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
changes = 0
while not over.wait(0.02):
    add_adapter(directory, f"x{changes % 3}={contents[changes % len(contents)]}", force=True)
    if changes == 0:
        print("begun", flush=True)
    if changes % 4 == 3:
        try:
            remove_adapter(directory, f"x{changes % 3}")
        except UsageError:
            pass  # the other process was first
    changes += 1
print(changes)
"""


@pytest.fixture
def another_process(contents):
    """`another_process(directory)`: one that changes the adapters; ends with how many changes."""
    running = []

    def begin(directory):
        process = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(directory), *map(str, contents)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        running.append(process)
        assert process.stdout.readline() == "begun\n"

        def end():
            out, _ = process.communicate(timeout=60)
            assert process.returncode == 0
            return int(out)

        return end

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def put_under_load(directory, oracle, contents, requests, *, measured=False):
    session = Session(directory)
    changes = Changes(session, contents)
    load = Load(session, oracle, requests, changes.enough, measured=measured)
    with changes:
        seconds = load.run()
    assert load.wrong == []
    assert changes.wrong == []
    return SimpleNamespace(load=load, made=changes.made, seconds=seconds)


@pytest.mark.parametrize("kind", ["banked", "switchable"])
def test_every_answer_is_that_of_the_version_it_reports(kind, copied, oracle, contents):
    done = put_under_load(copied(kind), oracle, contents, 400)

    assert done.load.told["answered"] > 200
    assert len({version for name, version in done.load.versions if name in NAMES}) > 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["banked", "switchable"])
def test_ten_thousand_requests_and_no_wrong_answer_crash_or_leak(
    kind, copied, oracle, contents, another_process
):
    directory = copied(kind)
    end = another_process(directory)

    done = put_under_load(directory, oracle, contents, 10_000, measured=True)

    memory = done.load.memory
    flat = memory[len(memory) // 2 :]
    print(  # shown with -s
        f"{kind}: {done.load.made / done.seconds:.0f} requests/s, {dict(done.load.told)}, changes "
        f"{dict(done.made)}, elsewhere {end()}, MB {[round(each / MEGABYTE) for each in memory]}"
    )
    assert done.load.told["answered"] > 5_000
    assert len({version for name, version in done.load.versions if name in NAMES}) == CONTENTS
    assert max(flat) - flat[0] < 4 * MEGABYTE, memory
    assert Artifact.read(directory).list_adapters().keys() <= {*NAMES, *STEADY}


def test_a_roster_that_is_looked_up_row_by_row_would_be_noticed(copied, oracle, contents):
    session = Session(copied("banked"))
    replies = []
    for row, content in enumerate(contents[:2]):
        session.add(f"x0={content}", force=True)
        inputs = {name: values[[row]] for name, values in oracle.inputs.items()}
        replies += session(inputs, "x0")

    assert oracle.judge([0], replies[:1]) == oracle.judge([1], replies[1:]) == []
    assert oracle.judge([0, 1], replies) == ["x0: two versions in one request"]


@pytest.mark.parametrize("fault", ["version", "row", "label"])
def test_a_wrong_answer_would_be_noticed(fault, banked, oracle):
    session = Session(banked)
    three, five = (session(oracle.inputs, name) for name in ("three", "five"))
    planted = {
        "version": [replace(three[0], version=session(oracle.inputs)[0].version)],
        "row": [three[1]],
        "label": [replace(three[0], version=five[0].version)],
    }

    assert oracle.judge([0], [three[0]]) == oracle.judge([0, 1], five[:2]) == []
    assert len(oracle.judge([0], planted[fault])) == 1
