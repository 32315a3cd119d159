"""The processes that train together: how many there are, and which one this is."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import parse_flag_from_env

from propulsion_export.errors import UnavailableError, UsageError, first_line


class _Launcher(NamedTuple):
    """The variables in which a launcher tells each process which one it is."""

    rank: str
    size: str
    local_rank: str


_TORCH = _Launcher("RANK", "WORLD_SIZE", "LOCAL_RANK")  # of torchrun and `accelerate launch`
# accelerate reads those of MPI too, in this order, but only where it trains on CPUs.
_MPI = (
    _Launcher("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    _Launcher("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    _Launcher("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
)
# accelerate reads these as numbers too where it trains on CPUs.
_LOCAL_SIZES = (
    "LOCAL_WORLD_SIZE",
    "MPI_LOCALNRANKS",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
)
_WAITS = timedelta(minutes=30)  # as transformers' Trainer; on CPUs this is the default


@dataclass(frozen=True)
class Processes:
    """The processes that train one adapter.

    Attributes:
        count: how many there are.
        index: which one this is, from 0.
        local_index: which one of those on this machine.
        grouped: whether they exchange tensors; a launcher may start a group of one.
        note: a sentence about variables that were ignored, or an empty text.
    """

    count: int = 1
    index: int = 0
    local_index: int = 0
    grouped: bool = False
    note: str = ""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and prints; exactly one does."""
        return self.index == 0


def started_processes() -> Processes:
    """What the launcher's variables say, read as accelerate does, but never by halves.

    Raises:
        UsageError: the variables contradict each other, are incomplete, or name processes that
            would not find each other.
    """
    return read_processes(os.environ, on_cpu=_on_cpu())


def read_processes(environment: Mapping[str, str], *, on_cpu: bool) -> Processes:
    """The processes that an environment describes; see `started_processes`."""
    values = _numbers(environment)
    can_meet = "MASTER_ADDR" in environment
    launcher = _launcher(values, can_meet=can_meet, on_cpu=on_cpu)
    if launcher is None:
        left = [name for name in _TORCH if name in values]
        partial = bool(left) and len(left) < len(_TORCH)
        note = f"{_shown(left, values)} without the rest of {', '.join(_TORCH)} was ignored."
        return Processes(note=note if partial else "")
    count, index = values[launcher.size], values[launcher.rank]
    local_index = values.get(launcher.local_rank, 0)
    if not index < count > local_index:
        named = [name for name in launcher if name in values]
        raise _refusal(
            f"{_shown(named, values)}: a rank is not below the number of processes", named
        )
    address = ["MASTER_ADDR"] if on_cpu else ["MASTER_ADDR", "MASTER_PORT"]
    if missing := [name for name in address if name not in environment]:
        raise _refusal(f"{launcher.size}={count} without {', '.join(missing)}", [launcher.size])
    if on_cpu:
        _check_threads(environment)
    return Processes(count, index, local_index, grouped=True)


@contextmanager
def joined(processes: Processes) -> Iterator[None]:
    """Form the group of processes; inside the block accelerate sees what `processes` says.

    Raises:
        UnavailableError: the processes do not find each other.
    """
    before = {name: os.environ.get(name) for name in (*_TORCH, "MASTER_PORT")}
    values = (processes.index, processes.count, processes.local_index)
    _set(
        {
            name: str(v) if processes.grouped else None
            for name, v in zip(_TORCH, values, strict=True)
        }
    )
    try:
        _join(processes)
        yield
    finally:
        _set(before)


def check_joined(state: Any, processes: Processes) -> None:
    """Check that accelerate's state, or arguments with the same attributes, say the same.

    Raises:
        UnavailableError: they do not, so that several processes or none would write.
    """
    found = getattr(state, "num_processes", None) or state.world_size
    if (found, state.process_index) != (processes.count, processes.index):
        raise UnavailableError(
            f"distributed training: process {processes.index} of {processes.count} was started, "
            f"accelerate sees process {state.process_index} of {found}"
        )


def _join(processes: Processes) -> None:
    on_cpu = _on_cpu()
    settings = {} if on_cpu or not processes.grouped else {"timeout": _WAITS}
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        state = PartialState(cpu=on_cpu, **settings)
    except (ValueError, torch.distributed.DistError) as error:
        raise UnavailableError(
            f"distributed training: process {processes.index} of {processes.count} did not find "
            f"the others ({first_line(error)})"
        ) from error
    check_joined(state, processes)


def _on_cpu() -> bool:
    """Whether accelerate trains on CPUs here, where it reads more variables."""
    try:
        asked = parse_flag_from_env("ACCELERATE_USE_CPU")
    except ValueError as error:
        value = os.environ["ACCELERATE_USE_CPU"]
        raise UsageError(f"ACCELERATE_USE_CPU is {value!r}, expected true or false") from error
    return bool(asked) or not torch.accelerator.is_available()


def _numbers(environment: Mapping[str, str]) -> dict[str, int]:
    """The variables that are set; accelerate takes one below zero for one that is not set."""
    values, wrong = {}, []
    names = [name for launcher in (_TORCH, *_MPI) for name in launcher]
    for name in (name for name in (*names, *_LOCAL_SIZES) if name in environment):
        try:
            values[name] = int(environment[name])
        except ValueError:
            wrong.append(f"{name} is {environment[name]!r}, expected a whole number")
    if wrong:
        raise UsageError(*wrong, remedy="Unset what a scheduler left in the environment.")
    return {name: value for name, value in values.items() if value >= 0}


def _launcher(values: Mapping[str, int], *, can_meet: bool, on_cpu: bool) -> _Launcher | None:
    """Whose variables count; None if all that are set describe a single process.

    Where torchrun's are complete, MPI's do not count: one `srun` or `mpirun` may start one
    torchrun on each machine.
    """
    needed = _TORCH[:2] if on_cpu else _TORCH
    several = _names_several(_TORCH, values)
    if all(name in values for name in needed) and (several or can_meet):
        return _TORCH
    found = [launcher for launcher in (_TORCH, *_MPI) if _names_several(launcher, values)]
    if not found:
        return None
    named = [name for launcher in (_TORCH, *found) for name in launcher if name in values]
    if len(found) > 1 or (found != [_TORCH] and any(name in values for name in _TORCH)):
        raise _refusal(f"{_shown(named, values)}: contradict each other", named)
    (launcher,) = found
    usable = on_cpu and launcher is not _TORCH
    needed = launcher[:2] if usable else _TORCH
    if missing := [name for name in needed if name not in values]:
        raise _refusal(f"{_shown(named, values)} without {', '.join(missing)}", named)
    return launcher


def _check_threads(environment: Mapping[str, str]) -> None:
    """Refuse what accelerate cannot read for a group on CPUs, though OpenMP ignores or takes it."""
    threads = environment.get("OMP_NUM_THREADS", "1")
    try:
        int(threads)
    except ValueError as error:
        raise UsageError(
            f"OMP_NUM_THREADS is {threads!r}, expected a whole number where several processes "
            "train on CPUs",
            remedy="Set it to the threads of each process.",
        ) from error


def _names_several(launcher: _Launcher, values: Mapping[str, int]) -> bool:
    ranks = (values.get(launcher.rank, 0), values.get(launcher.local_rank, 0))
    return values.get(launcher.size, 1) != 1 or any(ranks)


def _refusal(finding: str, named: Sequence[str]) -> UsageError:
    return UsageError(
        f"the environment has {finding}; expected none of these variables, or what torchrun or "
        "accelerate launch sets",
        remedy=f"Start several processes with one of those; for a single one: unset "
        f"{' '.join(dict.fromkeys(named))}.",
    )


def _shown(names: Sequence[str], values: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={values[name]}" for name in dict.fromkeys(names))


def _set(variables: Mapping[str, str | None]) -> None:
    """Set environment variables, or remove those whose value is None."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
