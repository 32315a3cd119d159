"""How many threads OMP_NUM_THREADS asks for, and how many there will be."""

import os

VARIABLE = "OMP_NUM_THREADS"  # of OpenMP, and so of PyTorch
_MOST_DIGITS = 9


def thread_count() -> int:
    """OMP_NUM_THREADS, the first number of a list, but no more than there are cores.

    0, the runtime's own choice, if it is unset or no number.
    """
    return min(_asked(), os.cpu_count() or 1)


def too_many_threads() -> str | None:
    """What to say where OMP_NUM_THREADS is more than there are cores; None elsewhere."""
    cores = os.cpu_count() or 1
    if _asked() <= cores:
        return None
    value = os.environ[VARIABLE]
    shown = value if len(value) <= 20 else f"{value[:17]}..."
    return f"{VARIABLE} is {shown}, and {cores}, the number of cores, is used instead"


def limit_threads() -> str | None:
    """Let libraries that are loaded from now on start one thread for each core at most.

    OpenMP would start as many as it is asked for, and end the process where it cannot.

    Returns:
        What to say about it; None if nothing has changed.
    """
    if finding := too_many_threads():
        os.environ[VARIABLE] = str(thread_count())
    return finding


def _asked() -> int:
    first = os.environ.get(VARIABLE, "").partition(",")[0].strip().removeprefix("+")
    if not first.isdecimal():
        return 0
    return int(first) if len(first) <= _MOST_DIGITS else 10**_MOST_DIGITS
