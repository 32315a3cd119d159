import pytest

from propulsion_export.engine.targets import RTX_DEFAULT, choose_runtime, choose_targets
from propulsion_export.errors import UnavailableError, UsageError

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra rtx)")


@pytest.mark.parametrize(
    ("modules", "gpus", "expected"),
    [
        pytest.param(["tensorrt", "tensorrt_rtx"], ["sm_90"], "tensorrt", id="both-gpu"),
        pytest.param(["tensorrt", "tensorrt_rtx"], [], "tensorrt-rtx", id="both-no-gpu"),
        pytest.param(["tensorrt_rtx"], ["sm_86"], "tensorrt-rtx", id="rtx-gpu"),
    ],
)
def test_auto_is_tensorrt_only_where_it_can_build(machine_with, installed, modules, gpus, expected):
    machine_with(*gpus)
    installed(*modules)

    assert choose_runtime("auto") == expected


def test_without_any_runtime_the_message_says_what_to_install(machine_with, installed):
    machine_with()
    installed()

    with pytest.raises(
        UnavailableError, match=r"pip install 'propulsion-export\[rtx\]'"
    ) as refusal:
        choose_runtime("auto")

    assert refusal.value.exit_code == 3


def test_tensorrt_without_a_gpu_is_unavailable_with_the_reason(machine_with, installed):
    machine_with()
    installed("tensorrt", "tensorrt_rtx")

    with pytest.raises(UnavailableError, match=r"needs a GPU to build.*no CUDA driver") as refusal:
        choose_runtime("tensorrt")

    assert refusal.value.exit_code == 3


def test_tensorrt_that_is_not_installed_is_unavailable(machine_with, installed):
    machine_with("sm_90")
    installed("tensorrt_rtx")

    with pytest.raises(UnavailableError, match=r"tensorrt: is not installed.*\[tensorrt\]"):
        choose_runtime("tensorrt")


def test_an_unknown_runtime_is_a_usage_error():
    with pytest.raises(UsageError, match="found 'onnx', expected one of auto, tensorrt"):
        choose_runtime("onnx")


def test_auto_is_the_gpu_of_this_machine(machine_with):
    machine_with("sm_89", "sm_86")

    assert choose_targets(["auto"], "tensorrt-rtx", "float32") == ("sm_89",)


def test_auto_without_a_gpu_is_the_default_of_tensorrt_rtx(machine_with):
    machine_with()

    assert choose_targets(["auto"], "tensorrt-rtx", "float32") == RTX_DEFAULT


def test_a_target_named_twice_is_built_once(machine_with):
    machine_with("sm_86")

    assert choose_targets(["auto", "sm_75", "sm_86"], "tensorrt-rtx", "float16") == (
        "sm_86",
        "sm_75",
    )


def test_a_gpu_that_tensorrt_rtx_does_not_know_is_refused_with_those_it_knows(machine_with):
    machine_with("sm_90")

    with pytest.raises(UsageError, match=r"found sm_90.*sm_75, sm_80, sm_86, sm_89, sm_120"):
        choose_targets(["auto"], "tensorrt-rtx", "float32")


def test_tensorrt_builds_for_its_own_gpu_only(machine_with):
    machine_with("sm_90")

    assert choose_targets(["auto"], "tensorrt", "float32") == ("sm_90",)
    with pytest.raises(
        UsageError, match="found sm_86, expected one that tensorrt builds for: sm_90"
    ):
        choose_targets(["sm_86"], "tensorrt", "float32")


def test_bfloat16_needs_ampere():
    assert choose_targets(["sm_80"], "tensorrt-rtx", "bfloat16") == ("sm_80",)
    with pytest.raises(UsageError, match="found sm_75 for a bfloat16 model, expected sm_80"):
        choose_targets(["sm_75", "sm_80"], "tensorrt-rtx", "bfloat16")


@pytest.mark.parametrize("target", ["86", "sm86", "sm_8.6", "current", ""])
def test_what_is_no_compute_capability_is_refused(target):
    with pytest.raises(UsageError, match=f"found '{target}', expected a compute capability"):
        choose_targets([target], "tensorrt-rtx", "float32")


def test_no_target_at_all_is_refused():
    with pytest.raises(UsageError, match="found none"):
        choose_targets([], "tensorrt-rtx", "float32")
