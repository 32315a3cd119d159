import shutil

import pytest

from propulsion_export.adapter import Adapter
from propulsion_export.errors import UsageError
from propulsion_export.pipeline.inputs import base_source, read_adapters, with_room


def test_an_adapter_is_called_what_it_is_named_or_its_directory(world):
    named, unnamed = read_adapters([f"tenant={world.three}", world.five])

    assert (named.name, unnamed.name) == ("tenant", "five")


def test_a_directory_with_an_equals_sign_is_a_directory(world, tmp_path):
    odd = shutil.copytree(world.three, tmp_path / "a=b")

    [adapter] = read_adapters([f"odd={odd}"])

    assert adapter.name == "odd"


@pytest.mark.parametrize("name", ["base", "", "../x", "a/b", ".hidden"])
def test_names_that_cannot_be_files_are_refused(name, world):
    with pytest.raises(UsageError, match="cannot be called"):
        read_adapters([f"{name}={world.three}"])


def test_the_base_is_where_the_caller_says_else_where_the_adapters_say(world):
    adapters = [Adapter.read(world.three)]

    assert base_source(None, adapters) == str(world.base)
    assert base_source("some/name", adapters) == "some/name"


def test_room_for_more_labels_is_zero_rows(world):
    adapter = Adapter.read(world.three)

    roomy = with_room(adapter, 5, frozenset({"classifier.weight", "classifier.bias"}))

    assert roomy.modules["classifier.weight"].shape[0] == 5
    assert not roomy.modules["classifier.weight"][3:].any()
    assert (roomy.modules["classifier.bias"][:3] == adapter.modules["classifier.bias"]).all()
