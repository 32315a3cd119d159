"""Which file a base model's path means."""

import pytest

from propulsion_export.base_model.gguf.source import find_gguf
from propulsion_export.errors import BaseModelError


def touch(directory, *names):
    for name in names:
        (directory / name).write_bytes(b"GGUF and more")


def test_a_file_is_itself(tmp_path):
    touch(tmp_path, "a.gguf", "b.gguf")

    assert find_gguf(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"


def test_a_file_of_another_name_is_known_by_its_first_bytes(tmp_path):
    touch(tmp_path, "sha256-0123")

    assert find_gguf(tmp_path / "sha256-0123") == tmp_path / "sha256-0123"


def test_a_directory_means_its_only_file(tmp_path):
    touch(tmp_path, "a.gguf", "README.md")

    assert find_gguf(tmp_path) == tmp_path / "a.gguf"


def test_safetensors_beside_it_win(tmp_path):
    touch(tmp_path, "a.gguf", "config.json", "model.safetensors")

    assert find_gguf(tmp_path) is None


def test_a_configuration_alone_does_not_win(tmp_path):
    touch(tmp_path, "a.gguf", "config.json")

    assert find_gguf(tmp_path) == tmp_path / "a.gguf"


@pytest.mark.parametrize("name", ["gpt2", "owner/model", "owner/model-GGUF"])
def test_a_name_on_a_hub_means_none(name):
    assert find_gguf(name) is None


def test_several_files_are_refused_with_a_remedy(tmp_path):
    touch(tmp_path, "a.gguf", "b.gguf")

    with pytest.raises(BaseModelError, match=r"2 GGUF files \(a.gguf, b.gguf\).*Give the path"):
        find_gguf(tmp_path)


@pytest.mark.parametrize("directory", [False, True], ids=["file", "directory"])
def test_a_part_of_a_model_is_refused_with_a_remedy(directory, tmp_path):
    names = [f"model-0000{index}-of-00003.gguf" for index in (1, 2, 3)]
    touch(tmp_path, *names)

    with pytest.raises(BaseModelError, match=r"part 1 of 3.*llama-gguf-split --merge"):
        find_gguf(tmp_path if directory else tmp_path / names[0])


def test_a_pointer_of_git_lfs_is_refused(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    (tmp_path / "a.gguf").write_text(pointer, encoding="utf-8")

    with pytest.raises(BaseModelError, match=r"a.gguf: is a git-lfs pointer"):
        find_gguf(tmp_path)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BaseModelError, match=r"a.gguf: does not exist, expected a GGUF file"):
        find_gguf(tmp_path / "a.gguf")
