"""Threads of a verdict sleep while they wait, unless the user has chosen otherwise."""

import os
import subprocess
import sys

import pytest

from propulsion_export.environment.waiting import let_threads_sleep, threads_sleep

# The command asks for it before torch, whose OpenMP reads the variable when it is loaded.
JUDGE = """
import os, sys
from propulsion_export import cli
seen = []
def note(event, arguments):
    if event == "import" and arguments[0] == "torch":
        seen.append(os.environ.get("OMP_WAIT_POLICY"))
sys.addaudithook(note)
try:
    cli.main([sys.argv[1], *sys.argv[2:]])
except SystemExit:
    pass
print(seen[0])
"""


@pytest.mark.parametrize(
    ("chosen", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE"), ("passive", "passive")]
)
def test_policy_of_the_user_stays(chosen, expected, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", chosen)

    let_threads_sleep()

    found = os.environ.pop("OMP_WAIT_POLICY")
    assert found == expected


@pytest.mark.parametrize(("policy", "expected"), [("PASSIVE", True), ("ACTIVE", False)])
def test_threads_sleep_only_where_they_are_told_to(policy, expected, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)

    assert threads_sleep() == expected


@pytest.mark.parametrize(
    "arguments", [["parity", "nothing"], ["export", "-a", "nothing", "-o", "there"]], ids=" ".join
)
def test_commands_that_judge_ask_before_torch_is_loaded(arguments, tmp_path):
    environment = {n: v for n, v in os.environ.items() if n != "OMP_WAIT_POLICY"}

    found = subprocess.run(
        [sys.executable, "-c", JUDGE, *arguments],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert found.stdout.splitlines()[-1] == "PASSIVE"
