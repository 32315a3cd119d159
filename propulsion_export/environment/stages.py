"""Measure where the time of a long call goes, stage by stage."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class Stages:
    """Stages in the order in which they began; one that runs again adds to its times.

    Attributes:
        seconds: wall-clock and CPU seconds by the name of the stage. CPU seconds are those of all
            threads of this process. A stage inside another is in both.
    """

    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """One line for each stage."""
        width = max(map(len, self.seconds), default=0)
        return [
            f"{name:<{width}}  {wall:7.1f} s  {cpu:7.1f} CPU-s"
            for name, (wall, cpu) in self.seconds.items()
        ]


_CURRENT: ContextVar[Stages | None] = ContextVar("stages", default=None)


@contextmanager
def measured() -> Iterator[Stages]:
    """Measure the stages that run inside the block, in this thread."""
    stages = Stages()
    token = _CURRENT.set(stages)
    try:
        yield stages
    finally:
        _CURRENT.reset(token)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Name what runs inside the block as a stage; costs nothing where nobody measures."""
    stages = _CURRENT.get()
    if stages is None:
        yield
        return
    wall, cpu = stages.seconds.setdefault(name, (0.0, 0.0))
    began, began_cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        wall += time.perf_counter() - began
        cpu += time.process_time() - began_cpu
        stages.seconds[name] = wall, cpu
