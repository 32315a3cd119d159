"""A killed process that nobody has waited for is dead, as in a container without an init."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from propulsion_export.artifacts.replacing import sweep


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system has no /proc")
def test_what_a_zombie_left_behind_is_cleaned_up(tmp_path):
    zombie = subprocess.Popen([sys.executable, "-S", "-c", ""])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    earlier = tmp_path / f".output.replaced-{zombie.pid}"
    earlier.mkdir()
    (earlier / "content").write_text("earlier")
    (tmp_path / f".output.partial-{zombie.pid}").mkdir()

    sweep(tmp_path / "output")

    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    assert (tmp_path / "output/content").read_text() == "earlier"
    zombie.wait()
