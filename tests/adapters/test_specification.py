import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.head_room import with_room
from propulsion_export.adapters.provenance import base_source
from propulsion_export.adapters.scales import Scale
from propulsion_export.adapters.specification import check_identity, read_adapters, source_of
from propulsion_export.errors import AdapterError, UsageError


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


def test_a_home_directory_is_found_and_recorded(world, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(world.three, tmp_path / "three")

    for given, name in (("~/three", "three"), ("mine=~/three", "mine")):
        [adapter] = read_adapters([given])
        assert adapter.name == name
        assert source_of(given) == str(tmp_path / "three")


def test_a_link_to_an_adapter_gives_it_its_name(world, tmp_path):
    (tmp_path / "latest").symlink_to(world.three)

    [adapter] = read_adapters([tmp_path / "latest"])

    assert adapter.name == Adapter.read(tmp_path / "latest").name == "latest"


def test_an_adapter_in_the_parent_directory_has_that_directorys_name(world, tmp_path, monkeypatch):
    shutil.copytree(world.three, tmp_path / "three")
    (tmp_path / "three" / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "three" / "inner")

    [adapter] = read_adapters([".."])

    assert adapter.name == "three"


def test_a_relative_base_is_found_beside_the_adapter(world, tmp_path, monkeypatch):
    shutil.copytree(world.base, tmp_path / "models" / "base")
    adapter = shutil.copytree(world.three, tmp_path / "models" / "three")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "./base"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)

    assert base_source(None, read_adapters([adapter])) == str(tmp_path / "models" / "base")


def test_ones_and_a_head_are_no_adapter(world):
    read = Adapter.read(world.five)
    ones = {path: Scale(np.ones_like(scale.values)) for path, scale in read.scales.items()}

    with pytest.raises(AdapterError, match="all its scales are 1 and no bias was trained"):
        check_identity(replace(read, scales=ones))


def test_a_name_that_is_too_long_for_any_file_is_refused_in_a_line():
    with pytest.raises(UsageError, match="because that cannot be a file name"):
        read_adapters([f"{'x' * 300}=adapters/a"])
