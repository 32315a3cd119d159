"""Which places each kind of mistake is planted in: as different ones as there are.

A place is chosen in the artifact that differs most from those that the kind is planted in already:
in its architecture, the precision of its weights, its form. Of those that differ alike, it is the
one that costs the least with what is planted in it already. Everything depends on a seed alone.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import NamedTuple

from mutation.mistakes import Place
from mutation.toys import Toy


class Key(NamedTuple):
    """A kind of mistake by name, and the one artifact that it is asked for in; empty: any."""

    kind: str
    toy: str = ""


# By artifact, the places that a kind can be planted in.
AllPlaces = Mapping[Key, Mapping[Toy, Sequence[Place]]]
Chosen = tuple[Toy, Place]
# Seconds of a mistake in an artifact, roughly; by architecture, and where no runtime has kernels.
_COSTS = {"encoder": 0.4, "decoder": 0.9, "encoder-decoder": 1.3}
_IN_PYTHON = 4.0


class Sample:
    """Places of every kind, in the order in which they are taken.

    Args:
        places: all places.
        seed: chooses among places that are alike.
    """

    def __init__(self, places: AllPlaces, seed: int) -> None:
        self._spent: Counter[Toy] = Counter()
        self._orders = {
            key: self._order(where, Random(f"{seed} {key.kind} {key.toy}"))
            for key, where in places.items()
        }

    @property
    def keys(self) -> list[Key]:
        """The kinds that there are places of."""
        return list(self._orders)

    def take(self, wanted: Mapping[Key, int]) -> list[tuple[Key, Chosen]]:
        """So many further places of each kind, one of each in turn; fewer if there are no more."""
        taken = []
        for turn in range(max(wanted.values(), default=0)):
            for key in (key for key, count in wanted.items() if turn < count):
                chosen = next(self._orders[key], None)
                if chosen is not None:
                    taken.append((key, chosen))
        return taken

    def _order(self, where: Mapping[Toy, Sequence[Place]], chooser: Random) -> Iterator[Chosen]:
        by_name = sorted(where.items(), key=lambda each: each[0].name)
        left = {toy: chooser.sample(list(places), len(places)) for toy, places in by_name}
        seen: Counter[str] = Counter()
        while left:
            drawn = {toy: chooser.random() for toy in left}
            toy = min(left, key=lambda each: (*self._rank(each, seen), drawn[each]))
            place = left[toy].pop()
            if not left[toy]:
                del left[toy]
            seen.update(features(toy).keys())
            self._spent[toy] += cost_of(toy)
            yield toy, place

    def _rank(self, toy: Toy, seen: Counter[str]) -> tuple[int, float]:
        """How like others an artifact is, and what it will have cost."""
        alike = sum(weight * seen[each] for each, weight in features(toy).items())
        return alike, self._spent[toy] + cost_of(toy)


def features(toy: Toy) -> dict[str, int]:
    """What the artifacts of a kind should differ in, and how much that counts."""
    return {toy.architecture: 4, toy.precision: 3, toy.shape: 2, toy.name: 1}


def cost_of(toy: Toy) -> float:
    """What a mistake in an artifact costs, in seconds of one core, roughly."""
    return _COSTS[toy.architecture] * (_IN_PYTHON if toy.runs_in_python else 1)
