"""How threads that compute together wait for each other."""

import os

_POLICY = "OMP_WAIT_POLICY"  # of OpenMP, and so of PyTorch


def let_threads_sleep() -> None:
    """Let threads sleep while they wait, in libraries that are loaded from now on.

    By default they wait in a loop. Where other programs compute on the same cores, that loop takes
    the time that the thread waited for needs: a verdict costs several times as much. A policy that
    the user has chosen stays.
    """
    os.environ.setdefault(_POLICY, "PASSIVE")


def threads_sleep() -> bool:
    """Whether threads are to sleep while they wait."""
    return os.environ.get(_POLICY, "").strip().upper() == "PASSIVE"
