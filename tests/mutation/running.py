"""Every mistake in every artifact, in several processes, continued where it was interrupted."""

import hashlib
import json
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random

from mutation.adapters import ADAPTERS
from mutation.files import FILES
from mutation.inputs import INPUTS
from mutation.judging import judge
from mutation.mistakes import Kind, Place
from mutation.nodes import NODES
from mutation.outputs import OUTPUTS
from mutation.planted import Copy
from mutation.quantised import QUANTISED
from mutation.remembering import Memory
from mutation.toys import Toy, build
from mutation.visible import UNLOADABLE, Visible
from mutation.weights import WEIGHTS

FAMILIES = (WEIGHTS, INPUTS, NODES, OUTPUTS, ADAPTERS, QUANTISED, FILES)
KINDS = tuple(kind for family in FAMILIES for kind in family.kinds)
# Seeds by architecture: more where a verdict is cheap; 1,000 in all.
CLEAN = {"encoder": 50, "decoder": 12, "encoder-decoder": 12}
_ROOT = Path(__file__).parents[2]
# A graph that a runtime does not load is a mistake of the planting.
_IN_GRAPH = ("weights", "inputs", "nodes", "outputs")
_REPORTING = ("report.py", "__main__.py")


@dataclass(frozen=True)
class Run:
    """One planted mistake, or a clean artifact, and what parity says of it.

    Attributes:
        toy: the name of the artifact.
        architecture: of its model.
        precision: the dtype of its weights, or the form of quantised ones.
        mode: of the artifact.
        kind: of the mistake; `clean` for none.
        place: where it is planted; for a clean artifact, the seed of the inputs.
        outcome: of `judging`, `unchanged` where nothing was changed, `inapplicable` without places.
        cases: that failed.
        detail: the words of the verdict.
        moved: see `visible.Moved`.
        scale: see `visible.Moved`.
        where: see `visible.Moved`.
        size: of the mistake, where it has one.
        seconds: that the verdict took.
    """

    toy: str
    architecture: str
    precision: str
    mode: str
    kind: str
    place: str
    outcome: str
    cases: tuple[str, ...] = ()
    detail: str = ""
    moved: float = 0.0
    scale: float = 0.0
    where: str = ""
    size: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        root: the directory of artifacts and results.
        kinds: the names of kinds, or parts of them; empty: all.
        places: the most places that a kind is planted in, in one artifact.
        clean: by architecture, how many seeds each artifact is judged with as it is.
        seed: chooses the places.
    """

    root: Path
    kinds: tuple[str, ...] = ()
    places: int = 2
    clean: Mapping[str, int] = field(default_factory=lambda: CLEAN)
    seed: int = 0

    def chosen(self) -> list[Kind]:
        """The kinds to plant."""
        return [k for k in KINDS if not self.kinds or any(p in k.name for p in self.kinds)]

    def results(self, toy: Toy) -> Path:
        """The file of the results of an artifact."""
        return self.root / "results" / f"{toy.name}.jsonl"


def run_all(plan: Plan, toys: Sequence[Toy], jobs: int) -> Iterator[Run]:
    """The runs of all artifacts, in the order in which they end; earlier results are read."""
    _forget_stale(plan.root)
    for toy in toys:  # one after the other: their base models and adapters are shared
        if plan.results(toy).is_file():
            yield from _read(plan.results(toy))
    if jobs == 1:
        for toy in toys:
            yield from run_toy(plan, toy)
        return
    with ProcessPoolExecutor(jobs) as pool:
        waiting = [pool.submit(_run_in_process, plan, toy) for toy in toys]
        for done in as_completed(waiting):
            yield from done.result()


def _run_in_process(plan: Plan, toy: Toy) -> list[Run]:
    import torch

    torch.set_num_threads(1)
    found = []
    for run in run_toy(plan, toy):
        found.append(run)
    return found


def run_toy(plan: Plan, toy: Toy) -> Iterator[Run]:
    """The runs of one artifact that there are no results of."""
    file = plan.results(toy)
    file.parent.mkdir(parents=True, exist_ok=True)
    known = {(run.kind, run.place) for run in _read(file)} if file.is_file() else set()
    began, count = time.monotonic(), 0
    with file.open("a", encoding="utf-8") as results:
        for run in _runs(plan, toy, known):
            results.write(json.dumps(asdict(run)) + "\n")
            results.flush()
            count += 1
            yield run
    print(f"{toy.name}: {count} runs, {time.monotonic() - began:.0f} s", flush=True)


def _runs(plan: Plan, toy: Toy, known: set[tuple[str, str]]) -> Iterator[Run]:
    clean = baseline(toy, plan.root)
    if toy.mode == "folded":
        build(replace(toy, mode="switchable"), plan.root)  # mistaken adapters are folded into it
    memory, visible = Memory(), None
    for seed in range(1, plan.clean[toy.architecture] + 1):
        if ("clean", str(seed)) not in known:
            yield _judged(toy, "clean", str(seed), clean, Memory(), seed=seed)
    view_directory = clean.with_name(f"{clean.name}.view")
    shutil.rmtree(view_directory, ignore_errors=True)
    view = Copy(clean, view_directory)
    for kind in plan.chosen():
        places = chosen_places(kind, view, plan)
        if not places and (kind.name, "") not in known:
            yield _run(toy, kind.name, "", "inapplicable", size=kind.size)
        for place in places:
            if (kind.name, _in_words(place)) in known:
                continue
            if visible is None:
                visible = Visible(clean, toy)
            yield plant_and_judge(toy, kind, place, clean, memory, visible)


def plant_and_judge(
    toy: Toy, kind: Kind, place: Place, clean: Path, memory: Memory, visible: Visible
) -> Run:
    """Plant one mistake in a copy, judge the copy, and measure what it moves."""
    directory = clean.with_name(f"{clean.name}.planted") / "copy"
    shutil.rmtree(directory.parent, ignore_errors=True)
    directory.parent.mkdir(parents=True)
    words = _in_words(place)
    try:
        copy = Copy(clean, directory)
        kind.plant_(copy, place)
        changed = copy.write()
    except Exception as error:  # the mistake does not fit this artifact, which is not a catch
        detail = traceback.format_exception_only(error)[-1].strip()[:300]
        return _run(toy, kind.name, words, "unplantable", detail=detail, size=kind.size)
    if not changed:
        return _run(toy, kind.name, words, "unchanged", size=kind.size)
    moved = visible.moved(directory, texts=kind.in_files)
    if moved.where.startswith(UNLOADABLE) and kind.family in _IN_GRAPH:
        return _run(toy, kind.name, words, "unplantable", detail=moved.where, size=kind.size)
    run = _judged(toy, kind.name, words, directory, memory, size=kind.size)
    return Run(
        **{**asdict(run), "moved": moved.allowed, "scale": moved.scale, "where": moved.where}
    )


def baseline(toy: Toy, root: Path) -> Path:
    """The directory of an artifact as `Copy` writes it without a mistake."""
    artifact = build(toy, root)
    directory = artifact.with_name(f"{artifact.name}.baseline")
    if not directory.is_dir():
        staged = artifact.with_name(f"{artifact.name}.staged")
        shutil.rmtree(staged, ignore_errors=True)
        copy = Copy(artifact, staged)
        _ = copy.graphs, copy.checkpoint
        copy.write()
        staged.rename(directory)
    return directory


def chosen_places(kind: Kind, view: Copy, plan: Plan) -> list[Place]:
    """A random choice of the places of a kind, always the same for a seed."""
    places = list(kind.places(view))
    chooser = Random(f"{plan.seed} {kind.name} {view.clean.name}")
    return chooser.sample(places, min(plan.places, len(places)))


def _judged(
    toy: Toy, kind: str, place: str, directory: Path, memory: Memory, *, seed: int = 0,
    size: float | None = None,
) -> Run:  # fmt: skip
    began = time.monotonic()
    found = judge(directory, memory, seed=seed)
    seconds = round(time.monotonic() - began, 3)
    return _run(
        toy, kind, place, found.outcome, cases=found.cases, detail=found.detail, size=size,
        seconds=seconds,
    )  # fmt: skip


def _run(toy: Toy, kind: str, place: str, outcome: str, **fields) -> Run:
    precision = toy.dtype if toy.form is None else f"int{toy.bits}"
    return Run(toy.name, toy.architecture, precision, toy.mode, kind, place, outcome, **fields)


def _in_words(place: Place) -> str:
    return " ".join(map(str, place))


def _read(file: Path) -> list[Run]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [Run(**{**value, "cases": tuple(value["cases"])}) for value in map(json.loads, lines)]


def _forget_stale(root: Path) -> None:
    """Remove what was made by another version of the package or of the mistakes."""
    stamp, now = root / "version", _version()
    if not stamp.is_file() or stamp.read_text() != now:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        stamp.write_text(now)


def _version() -> str:
    digest = hashlib.sha256()
    files = [*(_ROOT / "propulsion_export").rglob("*.py"), *Path(__file__).parent.glob("*.py")]
    for file in sorted(files):
        if file.name not in _REPORTING and not file.name.startswith("test_"):
            digest.update(file.read_bytes())
    return digest.hexdigest()
