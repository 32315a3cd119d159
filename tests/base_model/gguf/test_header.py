"""Headers of GGUF files, whole and damaged."""

import contextlib

import gguf
import pytest
from gguf_files import tiny_language_model, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from propulsion_export.base_model.gguf.header import read_header
from propulsion_export.errors import BaseModelError


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    model = tiny_language_model("llama")
    return write_gguf(tmp_path_factory.mktemp("header") / "model.gguf", model)


@pytest.mark.parametrize("alignment", [None, 64, 4096])
def test_a_header_is_what_the_package_gguf_reads(alignment, tmp_path):
    keys = {"general.alignment": alignment, "llama.a": [1, 2], "llama.b": True, "llama.c": -0.5}
    model = tiny_language_model("llama")
    file = write_gguf(tmp_path / "model.gguf", model, keys=keys, quantisation="Q5_1")

    header, reader = read_header(file), gguf.GGUFReader(file)

    assert header.metadata == {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF")
    }
    assert {
        name: (place.shape, place.kind, place.start, place.size)
        for name, place in header.tensors.items()
    } == {
        tensor.name: (
            tuple(map(int, tensor.shape[::-1])),
            tensor.tensor_type,
            tensor.data_offset,
            tensor.n_bytes,
        )
        for tensor in reader.tensors
    }


WRONG = {
    "empty": (b"", r"is empty, expected a GGUF file"),
    "other": (b"PK\x03\x04" + bytes(64), r"does not begin with GGUF"),
    "short": (b"GGUF\x03\x00", r"truncated or damaged \(ends inside its header\)"),
    "version-1": (b"GGUF" + (1).to_bytes(4, "little") + bytes(64), r"file of version 1, expected"),
    "version-9": (b"GGUF" + (9).to_bytes(4, "little") + bytes(64), r"file of version 9, expected"),
    "big-endian": (b"GGUF" + (3).to_bytes(4, "big") + bytes(64), r"file big endian, expected"),
    "no-keys": (b"GGUF" + (3).to_bytes(4, "little") + bytes(16), r"has no general.architecture"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_gguf_file_is_refused(name, tmp_path):
    content, message = WRONG[name]
    wrong = tmp_path / "model.gguf"
    wrong.write_bytes(content)

    with pytest.raises(BaseModelError, match=message):
        read_header(wrong)


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 0.9999))
def test_a_truncated_file_is_refused(file, share):
    whole = file.read_bytes()
    cut = file.parent / "cut.gguf"
    cut.write_bytes(whole[: int(len(whole) * share)])

    with pytest.raises(BaseModelError, match=r"truncated or damaged|is empty|begin with GGUF"):
        read_header(cut)


@settings(max_examples=200, deadline=None)
@given(place=st.integers(4, 12_000), value=st.integers(0, 255))
def test_a_damaged_header_is_read_or_refused(file, place, value):
    content = bytearray(file.read_bytes())
    content[place] = value
    damaged = file.parent / "damaged.gguf"
    damaged.write_bytes(content)

    with contextlib.suppress(BaseModelError):
        read_header(damaged)


def test_a_part_by_its_metadata_is_refused(tmp_path):
    model = tiny_language_model("llama")
    file = write_gguf(tmp_path / "model.gguf", model, keys={"split.count": 3})

    with pytest.raises(BaseModelError, match=r"is one of 3 parts"):
        read_header(file)
