"""Plant mistakes, judge them and clean artifacts, one after the other in one process.

What there are results of is not run again, so that an interrupted run goes on where it was.
"""

import json
import shutil
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random

from mutation.adapters import ADAPTERS
from mutation.baselines import baseline, exports
from mutation.files import FILES
from mutation.inputs import INPUTS
from mutation.judging import judge
from mutation.mistakes import Kind, Place
from mutation.nodes import NODES
from mutation.outputs import OUTPUTS
from mutation.planted import Copy
from mutation.quantised import QUANTISED
from mutation.remembering import Memory
from mutation.results import CLEAN, Results, Run, one_at_a_time
from mutation.sampling import AllPlaces, Key, Sample
from mutation.stamps import check_unchanged
from mutation.toys import TOYS, Toy, build
from mutation.visible import UNLOADABLE, Visible
from mutation.weights import WEIGHTS

FAMILIES = (WEIGHTS, INPUTS, NODES, OUTPUTS, ADAPTERS, QUANTISED, FILES)
KINDS = tuple(kind for family in FAMILIES for kind in family.kinds)
# A graph that a runtime does not load is a mistake of the planting.
_IN_GRAPH = ("weights", "inputs", "nodes", "outputs")
_PLACES_AT_ONCE = 3  # of a kind, before other kinds' turn
_TRIES = 4  # to find further places where a mistake does not fit, or changes nothing
_SEEDS_AT_ONCE = 4  # of a clean artifact, before the next artifact's turn


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        root: the directory of artifacts and results.
        toys: the artifacts.
        kinds: the names of kinds, or parts of them; empty: all.
        places: how many places each kind is planted in, in all artifacts together.
        everywhere: plant each kind in so many places of each artifact instead.
        clean: how many runs of clean artifacts, all together.
        seed: chooses the places.
        until: the time (`time.monotonic`) at which no run begins any more; None: all are run.
    """

    root: Path
    toys: Sequence[Toy] = TOYS
    kinds: tuple[str, ...] = ()
    places: int = 6
    everywhere: bool = False
    clean: int = 1000
    seed: int = 0
    until: float | None = None

    def chosen(self) -> dict[str, Kind]:
        """The kinds to plant, by name."""
        return {k.name: k for k in KINDS if not self.kinds or any(p in k.name for p in self.kinds)}

    def is_over(self) -> bool:
        """Whether the time is over."""
        return self.until is not None and time.monotonic() >= self.until

    def seeds(self) -> Iterator[tuple[Toy, list[int]]]:
        """Seeds of clean runs for all artifacts alike, a few for each in turn."""
        each, more = divmod(self.clean, len(self.toys))
        counts = {toy: each + (place < more) for place, toy in enumerate(self.toys)}
        for start in range(1, each + 2, _SEEDS_AT_ONCE):
            for toy, count in counts.items():
                yield toy, list(range(start, min(start + _SEEDS_AT_ONCE, count + 1)))


def run_all(plan: Plan, results: Results) -> Iterator[Run]:
    """All runs that there are no results of: mistakes first, then clean artifacts."""
    with one_at_a_time(plan.root):
        results.forget_stale_()
        yield from _mistakes(plan, results)
        for toy, seeds in plan.seeds():
            wanted = [seed for seed in seeds if (toy.name, CLEAN, str(seed)) not in results.runs]
            yield from _kept(_clean_runs(plan, toy, wanted), results)
            check_unchanged()


def _kept(runs: Iterator[Run], results: Results) -> Iterator[Run]:
    for run in runs:
        results.add(run)
        yield run


def _mistakes(plan: Plan, results: Results) -> Iterator[Run]:
    """Every kind in some of its places, then in some more; each time the artifacts in turn."""
    sample = Sample(_places(plan, results), plan.seed)
    planted: Counter[Key] = Counter()
    for most in [*range(_PLACES_AT_ONCE, plan.places, _PLACES_AT_ONCE), plan.places]:
        for _ in range(_TRIES):
            taken = sample.take({key: most - planted[key] for key in sample.keys})
            by_toy: dict[Toy, list[tuple[Key, Place]]] = defaultdict(list)
            for key, (toy, place) in taken:
                by_toy[toy].append((key, place))
            for toy in filter(by_toy.__contains__, plan.toys):
                kinds = [(key.kind, place) for key, place in by_toy[toy]]
                yield from _kept(_planted(plan, toy, kinds, results), results)
                check_unchanged()
                if plan.is_over():
                    return
                for key, place in by_toy[toy]:
                    planted[key] += results.runs[toy.name, key.kind, in_words(place)].counts


def _planted(
    plan: Plan, toy: Toy, mistakes: Sequence[tuple[str, Place]], results: Results
) -> Iterator[Run]:
    """The runs of the mistakes in one artifact that there are no results of."""
    wanted = [
        (kind, place)
        for kind, place in mistakes
        if (toy.name, kind, in_words(place)) not in results.runs
    ]
    if not wanted:
        return
    clean, kinds, began = baseline(toy, plan.root), plan.chosen(), time.monotonic()
    if toy.mode == "folded":  # mistaken adapters are folded into it
        build(replace(toy, mode="switchable"), exports(plan.root))
    memory, visible = Memory(), cache(lambda: Visible(clean, toy))
    for kind, place in wanted:
        if plan.is_over():
            break
        yield plant_and_judge(toy, kinds[kind], place, clean, memory, visible())
    print(f"{toy.name}: {len(wanted)} mistakes, {time.monotonic() - began:.0f} s", flush=True)


def _clean_runs(plan: Plan, toy: Toy, seeds: Sequence[int]) -> Iterator[Run]:
    """Verdicts on an artifact as it is, with other inputs each time."""
    if not seeds or plan.is_over():
        return
    try:
        clean = baseline(toy, plan.root)
    except Exception as error:  # told, and fails the gate, without stopping the others
        yield Run.of(toy, CLEAN, "export", "crashed", detail=str(error)[:300])
        return
    began = time.monotonic()
    for seed in seeds:
        if plan.is_over():
            break
        yield _judged(toy, CLEAN, str(seed), clean, seed=seed)
    print(f"{toy.name}: clean, {len(seeds)} seeds, {time.monotonic() - began:.0f} s", flush=True)


def plant_and_judge(
    toy: Toy, kind: Kind, place: Place, clean: Path, memory: Memory, visible: Visible
) -> Run:
    """Plant one mistake in a copy, judge the copy, and measure what it moves."""
    began = time.process_time()
    directory = clean.with_name(f"{clean.name}.planted") / "copy"
    shutil.rmtree(directory.parent, ignore_errors=True)
    directory.parent.mkdir(parents=True)
    words = in_words(place)
    try:
        copy = Copy(clean, directory)
        kind.plant_(copy, place)
        changed = copy.write()
    except Exception as error:  # the mistake does not fit this artifact, which is not a catch
        detail = traceback.format_exception_only(error)[-1].strip()[:300]
        return Run.of(toy, kind.name, words, "unplantable", detail=detail, size=kind.size)
    if not changed:
        return Run.of(toy, kind.name, words, "unchanged", size=kind.size)
    moved = visible.moved(directory, texts=kind.in_files)
    if moved.where.startswith(UNLOADABLE) and kind.family in _IN_GRAPH:
        return Run.of(toy, kind.name, words, "unplantable", detail=moved.where, size=kind.size)
    run = _judged(toy, kind.name, words, directory, memory)
    return replace(
        run,
        size=kind.size,
        moved=moved.allowed,
        scale=moved.scale,
        where=moved.where,
        all_seconds=round(time.process_time() - began, 3),
    )


def chosen_places(kind: Kind, view: Copy, plan: Plan) -> list[Place]:
    """A random choice of the places of a kind in an artifact, always the same for a seed."""
    places = list(kind.places(view))
    chooser = Random(f"{plan.seed} {kind.name} {view.clean.name}")
    return chooser.sample(places, min(plan.places, len(places)))


def _places(plan: Plan, results: Results) -> AllPlaces:
    """The places of every kind in all artifacts, or in each artifact."""
    found: dict[Key, dict[Toy, list[Place]]] = defaultdict(dict)
    for toy in plan.toys:
        for kind, places in _places_in(plan, toy, results.directory / "places").items():
            if kind in plan.chosen():
                found[Key(kind, toy.name if plan.everywhere else "")][toy] = places
    return found


def _places_in(plan: Plan, toy: Toy, known: Path) -> Mapping[str, list[Place]]:
    """The places of every kind in one artifact; looked for once."""
    file = known / f"{toy.name}.json"
    if not file.is_file():
        try:
            clean = baseline(toy, plan.root)
        except Exception:  # the run of the clean artifact tells it
            return {}
        view = clean.with_name(f"{clean.name}.view")
        shutil.rmtree(view, ignore_errors=True)
        copy = Copy(clean, view)
        found = {kind.name: list(kind.places(copy)) for kind in KINDS}
        shutil.rmtree(view)
        known.mkdir(exist_ok=True)
        file.write_text(json.dumps({kind: places for kind, places in found.items() if places}))
    return {k: list(map(tuple, places)) for k, places in json.loads(file.read_text()).items()}


def _judged(
    toy: Toy,
    kind: str,
    place: str,
    directory: Path,
    memory: Memory | None = None,
    *,
    seed: int = 0,
) -> Run:
    began = time.process_time()
    found = judge(directory, memory, seed=seed)
    seconds = round(time.process_time() - began, 3)
    return Run.of(
        toy, kind, place, found.outcome, cases=found.cases, detail=found.detail,
        seconds=seconds, all_seconds=seconds,
    )  # fmt: skip


def in_words(place: Place) -> str:
    """A place as results have it."""
    return " ".join(map(str, place))
