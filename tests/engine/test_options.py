from pathlib import Path

import pytest

from propulsion_export.engine.options import BuildOptions, check_options
from propulsion_export.errors import UnavailableError, UsageError

ON_GPU = [
    pytest.param(BuildOptions(refit="scales"), "--refit", id="refit"),
    pytest.param(BuildOptions(strip_weights=True), "--strip-weights", id="strip"),
    pytest.param(BuildOptions(version_compatible=True), "--version-compatible", id="version"),
]


@pytest.mark.parametrize(("options", "name"), ON_GPU)
def test_tensorrt_rtx_needs_a_gpu_for_some_options(machine_with, options, name):
    machine_with()

    with pytest.raises(UnavailableError, match=f"{name}.*needs a GPU.*no CUDA driver") as refusal:
        check_options(options, "tensorrt-rtx", "switchable")

    assert refusal.value.exit_code == 3


@pytest.mark.parametrize(("options", "name"), ON_GPU)
def test_with_a_gpu_they_are_possible(machine_with, options, name):
    machine_with("sm_86")

    check_options(options, "tensorrt-rtx", "switchable")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        pytest.param(BuildOptions(timing_cache=Path("cache")), "--timing-cache", id="cache"),
        pytest.param(
            BuildOptions(hardware_compatibility="ampere+"), "--hardware-compatibility", id="gpus"
        ),
    ],
)
def test_tensorrt_rtx_lacks_some_options_even_with_a_gpu(machine_with, options, name):
    machine_with("sm_86")

    with pytest.raises(UnavailableError, match=f"{name}: tensorrt-rtx has no such option"):
        check_options(options, "tensorrt-rtx", "folded")
    check_options(options, "tensorrt", "folded")


@pytest.mark.parametrize(
    ("options", "mode", "message"),
    [
        pytest.param(
            BuildOptions(builder_optimization_level=6),
            "folded",
            "found 6, expected 0 to 5",
            id="level",
        ),
        pytest.param(BuildOptions(workspace=0), "folded", "found 0, expected MiB", id="workspace"),
        pytest.param(
            BuildOptions(refit="scales"), "folded", "found a folded artifact", id="folded"
        ),
        pytest.param(
            BuildOptions(refit="scales", strip_weights=True),
            "switchable",
            "expected one of them",
            id="refit-and-strip",
        ),
        pytest.param(
            BuildOptions(bank="input"), "switchable", "--bank input: found a switchable", id="fed"
        ),
        pytest.param(
            BuildOptions(bank="constant"), "folded", "--bank constant: found a folded", id="bank"
        ),
        pytest.param(
            BuildOptions(bank="constant", refit="scales"),
            "bank",
            "--bank: does nothing with --refit scales",
            id="bank-and-refit",
        ),
    ],
)
def test_options_that_cannot_be_are_usage_errors(machine_with, options, mode, message):
    machine_with("sm_86")

    with pytest.raises(UsageError, match=message):
        check_options(options, "tensorrt", mode)


def test_a_timing_cache_is_a_file(machine_with, tmp_path):
    machine_with("sm_86")

    with pytest.raises(UsageError, match="--timing-cache: found the directory"):
        check_options(BuildOptions(timing_cache=tmp_path), "tensorrt", "folded")


def test_nothing_of_this_machine_is_recorded():
    recorded = BuildOptions(timing_cache=Path("/home/somebody/cache")).recorded()

    assert "somebody" not in str(recorded)
