"""Every mistake in every artifact, in several processes, continued where it was interrupted."""

import hashlib
import json
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from functools import cache
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
from mutation.toys import TOYS, Toy, build
from mutation.visible import UNLOADABLE, Visible
from mutation.weights import WEIGHTS

FAMILIES = (WEIGHTS, INPUTS, NODES, OUTPUTS, ADAPTERS, QUANTISED, FILES)
KINDS = tuple(kind for family in FAMILIES for kind in family.kinds)
# Seeds by architecture: more where a verdict is cheap; 1,000 in all.
CLEAN = {"encoder": 63, "decoder": 6, "encoder-decoder": 6}
_EVERY = 50  # runs, after which a process says how far it is
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
        artifacts: in how many artifacts of one architecture and precision; see `Kind.everywhere`.
        clean: by architecture, how many seeds each artifact is judged with as it is.
        seed: chooses the places.
    """

    root: Path
    kinds: tuple[str, ...] = ()
    places: int = 1
    artifacts: int = 2
    clean: Mapping[str, int] = field(default_factory=lambda: CLEAN)
    seed: int = 0

    def chosen(self) -> list[Kind]:
        """The kinds to plant."""
        return [k for k in KINDS if not self.kinds or any(p in k.name for p in self.kinds)]

    def takes(self, kind: Kind, toy: Toy) -> bool:
        """Whether a kind is planted in an artifact; the choice depends on the seed alone."""
        if kind.everywhere:
            return True
        in_graph = kind.family in ("inputs", "nodes", "outputs")
        group = [
            other.name
            for other in TOYS
            if (other.architecture, precision_of(other)) == (toy.architecture, precision_of(toy))
            and not (in_graph and other.mode == "merged")
        ]
        Random(f"{self.seed} {kind.name} {toy.architecture} {precision_of(toy)}").shuffle(group)
        return toy.name in group[: self.artifacts]

    def results(self, toy: Toy) -> Path:
        """The file of the results of an artifact."""
        return self.root / "results" / f"{toy.name}.jsonl"


def known_runs(plan: Plan, toys: Sequence[Toy]) -> list[Run]:
    """The runs of artifacts that there are results of."""
    files = [plan.results(toy) for toy in toys]
    return [run for file in files if file.is_file() for run in _read(file)]


def run_all(plan: Plan, toys: Sequence[Toy], jobs: int) -> Iterator[Run]:
    """The runs of all artifacts, in the order in which they end; earlier results are read."""
    _forget_stale(plan.root)
    yield from known_runs(plan, toys)
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
    return list(run_toy(plan, toy))


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
            if count % _EVERY == 0:
                print(f"{toy.name}: {count} runs so far", flush=True)
            yield run
    print(f"{toy.name}: {count} runs, {time.monotonic() - began:.0f} s", flush=True)


def _runs(plan: Plan, toy: Toy, known: set[tuple[str, str]]) -> Iterator[Run]:
    try:
        clean = baseline(toy, plan.root)
    except Exception as error:  # told, and fails the gate, without stopping the others
        yield _run(toy, "clean", "export", "crashed", detail=str(error)[:300])
        return
    if toy.mode == "folded":
        build(replace(toy, mode="switchable"), plan.root)  # mistaken adapters are folded into it
    for seed in range(1, plan.clean[toy.architecture] + 1):
        if ("clean", str(seed)) not in known:
            yield _judged(toy, "clean", str(seed), clean, Memory(), seed=seed)
    memory, visible = Memory(), _lazily_visible(clean, toy)
    view = clean.with_name(f"{clean.name}.view")
    shutil.rmtree(view, ignore_errors=True)
    for kind, place in _places(plan, toy, Copy(clean, view)):
        if (kind.name, _in_words(place or ())) in known:
            continue
        if place is None:
            yield _run(toy, kind.name, "", "inapplicable", size=kind.size)
        else:
            yield plant_and_judge(toy, kind, place, clean, memory, visible())


def _places(plan: Plan, toy: Toy, view: Copy) -> Iterator[tuple[Kind, Place | None]]:
    """Every kind with the places to plant it in; None where it does not apply."""
    for kind in plan.chosen():
        if plan.takes(kind, toy):
            yield from ((kind, place) for place in chosen_places(kind, view, plan) or [None])


def _lazily_visible(clean: Path, toy: Toy) -> Callable[[], Visible]:
    """What a user sees of an artifact, computed when it is first asked for."""
    return cache(lambda: Visible(clean, toy))


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
    return Run(
        toy.name, toy.architecture, precision_of(toy), toy.mode, kind, place, outcome, **fields
    )


def precision_of(toy: Toy) -> str:
    """The dtype of an artifact's weights, or the integers that they are quantised to."""
    return toy.dtype if toy.form is None else f"int{toy.bits}"


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
