"""A verdict with an exit code and JUnit, as a CI job needs it."""

import subprocess
import sys
from pathlib import Path

artifact, report = sys.argv[1:]  # an artifact, and a directory for the report

program = Path(sys.executable).with_name("propulsion-export")
done = subprocess.run(
    [program, "parity", artifact, "--report", report, "--junit", f"{report}.xml"], check=False
)
# 0 passed, 1 out of tolerance, 3 nothing could be compared here, 4 something is damaged.
print({0: "passed", 1: "FAILED", 3: "not run"}.get(done.returncode, "broken"))
sys.exit(done.returncode)
