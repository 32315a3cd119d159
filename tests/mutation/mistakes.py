"""One kind of mistake, the places that it can be planted in, and the list of all kinds."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from mutation.planted import Copy

# Where a mistake is planted: a weight, a node, a channel, a row; printed in the report.
Place = tuple[Any, ...]
Places = Callable[[Copy], Iterable[Place]]
Plant = Callable[..., None]


@dataclass(frozen=True)
class Kind:
    """One kind of mistake.

    Attributes:
        name: what is wrong.
        family: the module that it is in.
        places: all places in an artifact that it can be planted in; none: it does not apply.
        plant_: plants it in a copy, in one of the places.
        size: the relative size of the mistake, where it has one; such kinds share a `name` but for
            their size.
        in_files: whether it is in a file that a user's session reads, and not in the numbers.
        everywhere: whether it is planted in every artifact that it applies to; others are planted
            in some of those of an architecture and a precision.
    """

    name: str
    family: str
    places: Places
    plant_: Plant
    size: float | None = None
    in_files: bool = False
    everywhere: bool = False


class Family:
    """The kinds of one module, in the order in which they are defined; see `Kind`."""

    def __init__(self, name: str, *, everywhere: bool = False) -> None:
        self.name = name
        self.everywhere = everywhere
        self.kinds: list[Kind] = []

    def kind(
        self, name: str, places: Places, *, in_files: bool = False, everywhere: bool = False
    ) -> Callable[[Plant], Plant]:
        """Define a kind by the function that plants it."""

        def define(plant_: Plant) -> Plant:
            kind = Kind(
                name,
                self.name,
                places,
                plant_,
                in_files=in_files,
                everywhere=everywhere or self.everywhere,
            )
            self.kinds.append(kind)
            return plant_

        return define

    def sized(self, name: str, places: Places, *sizes: float) -> Callable[[Plant], Plant]:
        """Define a kind for each size; the function takes `size`."""

        def define(plant_: Plant) -> Plant:
            for size in sizes:
                sized = partial(plant_, size=size)
                self.kinds.append(self._of_size(name, places, sized, size))
            return plant_

        return define

    def _of_size(self, name: str, places: Places, plant_: Plant, size: float) -> Kind:
        every = self.everywhere
        return Kind(f"{name} {size:.1%}", self.name, places, plant_, size, everywhere=every)
