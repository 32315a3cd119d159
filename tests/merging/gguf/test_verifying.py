"""`--verify` of a merged GGUF file: a byte that changed after it was written is found."""

import os

import numpy as np
import pytest
from merged_gguf import toy

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.base_model.gguf.header import read_header
from propulsion_export.cli import main
from propulsion_export.errors import VerificationError
from propulsion_export.merging import meter
from propulsion_export.pipeline import merge_gguf as pipeline
from propulsion_export.pipeline.merge_gguf import merge_gguf

UP, NORM = "model.layers.0.mlp.up_proj", "model.layers.0.input_layernorm"
CHANGED, OTHER = "blk.0.ffn_up.weight", "blk.1.ffn_up.weight"


@pytest.fixture
def adapter(saved):
    chooser = np.random.default_rng(0)
    scales = {UP: Scale(chooser.uniform(0.5, 1.5, 96)), NORM: Scale(chooser.uniform(0.5, 1.5, 64))}
    return saved(Adapter("tuned", scales))


@pytest.mark.parametrize("kind", [None, "F16", "BF16", "Q4_0", "Q8_0"])
def test_a_file_as_it_was_written_passes(kind, adapter, tmp_path):
    file, _ = toy(tmp_path, "llama", kind)
    plain = merge_gguf(adapter, tmp_path / "plain.gguf", model=str(file)).read_bytes()

    written = merge_gguf(adapter, tmp_path / "out.gguf", model=str(file), verify=True)

    assert written.read_bytes() == plain


def test_an_output_that_is_untied_passes(saved, tmp_path):
    file, _ = toy(tmp_path, "llama", "Q8_0", tie_word_embeddings=True)
    values = np.random.default_rng(0).uniform(0.5, 1.5, 300)
    adapter = saved(Adapter("tuned", {"lm_head": Scale(values)}))

    written = merge_gguf(adapter, tmp_path / "out.gguf", model=str(file), untie=True, verify=True)

    assert "output.weight" in read_header(written).tensors


def test_the_nearest_numbers_pass(saved, tmp_path):
    file, _ = toy(tmp_path, "llama", "Q4_0")
    adapter = saved(Adapter("tuned", {UP: Scale(np.array([1e9, *[1.0] * 95]))}))

    merge_gguf(
        adapter, tmp_path / "out.gguf", model=str(file), allow_range=True, verify=True
    )  # raises nothing


# A byte of the file, and what is said of it.
FLIPS = {
    "quants": (lambda header: header.tensors[CHANGED].start + 18 * 5 + 7, "row 2: its quants"),
    "scales": (lambda header: header.tensors[CHANGED].start + 18 * 3, "row 1: its scales"),
    "norm": (lambda header: header.tensors["blk.0.attn_norm.weight"].start, "row 0: its scales"),
    "other": (lambda header: header.tensors[OTHER].start + 40, f"{OTHER}: is not the base"),
    "type": (lambda header: header.sections.entries[0] + 8, "shape or type|header|damaged"),
    "key": (lambda header: header.sections.keys["custom.key"][1] - 1, "custom.key: is not the"),
    "record": (lambda header: header.sections.keys["propulsion.adapters"][1] - 1, "propulsion.ada"),
    "padding": (lambda header: header.sections.data - 1, "header is not what"),
    "end": (lambda header: header.file.stat().st_size - 1, "is not the base|bytes from"),
}


@pytest.mark.parametrize("flip", FLIPS)
def test_a_byte_that_changed_between_writing_and_reading_is_found(
    flip, adapter, tmp_path, monkeypatch
):
    place, message = FLIPS[flip]
    file, _ = toy(tmp_path, "llama", "Q4_0", keys={"custom.key": "abc"})
    header = read_header(merge_gguf(adapter, tmp_path / "whole.gguf", model=str(file)))
    plain = pipeline.verify_file

    def damaged(writer, source, path):
        with path.open("r+b") as opened:
            opened.seek(place(header))
            byte = opened.read(1)
            opened.seek(place(header))
            opened.write(bytes([byte[0] ^ 1]))
        plain(writer, source, path)

    monkeypatch.setattr(pipeline, "verify_file", damaged)
    with pytest.raises(VerificationError, match=message):
        merge_gguf(adapter, tmp_path / "out.gguf", model=str(file), verify=True)

    assert not (tmp_path / "out.gguf").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_file_that_was_cut_is_found(adapter, tmp_path, monkeypatch):
    file, _ = toy(tmp_path, "llama", "Q4_0")
    plain = pipeline.verify_file

    def cut(writer, source, path):
        os.truncate(path, path.stat().st_size - 64)
        plain(writer, source, path)

    monkeypatch.setattr(pipeline, "verify_file", cut)
    with pytest.raises(VerificationError, match="truncated or damaged"):
        merge_gguf(adapter, tmp_path / "out.gguf", model=str(file), verify=True)


def test_the_command_takes_it(adapter, tmp_path, monkeypatch, capsys):
    file, _ = toy(tmp_path, "llama", "Q4_0")
    seen = []
    plain = pipeline.verify_file
    monkeypatch.setattr(pipeline, "verify_file", lambda *a: (seen.append(a), plain(*a)))

    output = tmp_path / "out.gguf"
    with pytest.raises(SystemExit) as exit:
        main(["merge", "-m", str(file), "-a", str(adapter), "-o", str(output), "--verify", "-q"])

    assert exit.value.code == 0
    assert len(seen) == 1


def test_progress_is_in_bytes_per_second(adapter, tmp_path, monkeypatch):
    file, _ = toy(tmp_path, "llama", "Q4_0")
    monkeypatch.setattr(meter, "_EVERY", 0.0)
    lines = []

    merge_gguf(
        adapter,
        tmp_path / "out.gguf",
        model=str(file),
        progress=lambda *line: lines.append(line),
    )

    inner = lines[1:-1]
    assert len(inner) > 3
    assert [share for share, _ in inner] == sorted(share for share, _ in inner)
    assert all(" GB, " in text and text.endswith(" MB/s") for _, text in inner)
    assert inner[-1][0] == pytest.approx(0.95)
