"""`merge` of a GGUF file into a GGUF file: what is kept, recorded and refused."""

import json
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from gguf_files import tiny_language_model, write_gguf
from merged_gguf import folded, toy, weights

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.base_model.gguf.header import read_header
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.cli import main
from propulsion_export.errors import AdapterError, BaseModelError, UsageError
from propulsion_export.pipeline.merge_gguf import merge_gguf

UP = "model.layers.0.mlp.up_proj"


def adapter_of(path=UP, size=96, *, seed=0, **given):
    values = np.random.default_rng(seed).uniform(0.5, 1.5, size).astype(np.float32)
    return Adapter("tuned", {path: Scale(values.astype(np.float64))}, **given)


def merged(directory, adapter, file, **options):
    return merge_gguf(adapter, directory / "merged.gguf", model=str(file), **options)


@pytest.mark.parametrize("alignment", [None, 64, 256])
def test_every_key_and_every_other_tensor_stays_byte_for_byte(alignment, saved, tmp_path):
    keys = {"general.name": "toy", "custom.key": [1.5, 2.5], "general.alignment": alignment}
    file, _ = toy(tmp_path, "llama", "Q4_0", keys=keys)

    written = merged(tmp_path, saved(adapter_of()), file)

    before, after = gguf.GGUFReader(file), gguf.GGUFReader(written)
    for name, field in before.fields.items():
        if not name.startswith("GGUF."):
            parts = [part.tobytes() for part in after.fields[name].parts]
            assert parts == [part.tobytes() for part in field.parts], name
    new = after.fields.keys() - before.fields.keys()
    assert new == {
        "general.description",
        "propulsion.adapters",
        "propulsion.adapter_digests",
        "propulsion.bases",
        "propulsion.base_fingerprints",
        "propulsion.versions",
    }
    assert after.alignment == (alignment or 32)
    pairs = list(zip(before.tensors, after.tensors, strict=True))
    assert [(a.name, a.tensor_type) for a, _ in pairs] == [
        (b.name, b.tensor_type) for _, b in pairs
    ]
    changed = [a.name for a, b in pairs if a.data.tobytes() != b.data.tobytes()]
    assert changed == ["blk.0.ffn_up.weight"]


def test_a_description_gets_a_sentence_more(saved, tmp_path):
    file, _ = toy(tmp_path, keys={"general.description": "A toy."})
    adapter = saved(adapter_of())

    written = merged(tmp_path, adapter, file)

    said = gguf.GGUFReader(written).fields["general.description"].contents()
    assert said.startswith("A toy. The Propulsion adapter tuned (sha256:")


def test_an_adapter_is_not_merged_twice_but_another_is(saved, tmp_path):
    file, _ = toy(tmp_path)
    adapter, other = saved(adapter_of()), saved(adapter_of(seed=1), "other")
    once = merged(tmp_path, adapter, file)

    twice = merge_gguf(other, tmp_path / "twice.gguf", model=str(once))

    for made in (once, twice):
        with pytest.raises(BaseModelError, match=r"holds the adapter tuned already by its meta"):
            merge_gguf(adapter, tmp_path / "no.gguf", model=str(made))
    expected = folded(once, Adapter.read(other))
    assert all(torch.equal(weights(twice)[name], expected[name]) for name in expected)
    assert gguf.GGUFReader(twice).fields["propulsion.adapters"].contents() == ["tuned", "other"]


@pytest.mark.parametrize("path", ["lm_head", "model.embed_tokens", "both"])
def test_a_tied_output_gets_a_tensor_of_its_own_if_allowed(path, saved, tmp_path):
    file, _ = toy(tmp_path, tie_word_embeddings=True, keys={"general.alignment": 64})
    head, embedding = adapter_of("lm_head", 300), adapter_of("model.embed_tokens", 64)
    scales = {**(head.scales if path != "model.embed_tokens" else {})}
    scales |= embedding.scales if path != "lm_head" else {}
    adapter = saved(Adapter("tuned", scales))

    with pytest.raises(BaseModelError, match=r"untying them adds 0.1 MiB. Accept that with --unti"):
        merged(tmp_path, adapter, file)
    written = merged(tmp_path, adapter, file, untie=True)

    expected = folded(file, Adapter.read(adapter), untie=True)
    found = weights(written)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_tied_output_of_quantised_rows_is_scaled(saved, tmp_path):
    file, _ = toy(tmp_path, "llama", "Q8_0", tie_word_embeddings=True)
    adapter = saved(adapter_of("lm_head", 300))

    found = weights(merged(tmp_path, adapter, file, untie=True))

    expected = folded(file, Adapter.read(adapter), untie=True)["lm_head.weight"]
    assert ((found["lm_head.weight"] - expected).abs() <= 2.0**-11 * 1.001 * expected.abs()).all()
    assert torch.equal(
        found["model.embed_tokens.weight"], weights(file)["model.embed_tokens.weight"]
    )


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_a_gemma_cannot_have_an_output_of_its_own(kind, saved, tmp_path):
    file, _ = toy(tmp_path, kind)

    with pytest.raises(BaseModelError, match=r"llama.cpp reads no other output of a gemma"):
        merged(tmp_path, saved(adapter_of("lm_head", 300)), file, untie=True)


def test_a_trained_bias_that_the_file_left_out_is_added(saved, tmp_path):
    model = tiny_language_model("llama", attention_bias=True)
    without = {f"blk.{layer}.attn_output.bias": None for layer in (0, 1)}
    file = write_gguf(tmp_path / "base.gguf", model, tensors=without)
    path = "model.layers.0.self_attn.o_proj"
    bias = np.linspace(-1, 1, 64).astype(np.float32)
    adapter = saved(adapter_of(path, 64, biases={path: bias}))

    found = weights(merged(tmp_path, adapter, file))

    expected = folded(file, Adapter.read(adapter))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


REFUSED = {
    "bias": (
        adapter_of("model.layers.0.mlp.up_proj", 96, biases={UP: np.ones(96, np.float32)}),
        "qwen2",
        AdapterError,
        r"up_proj.bias: was trained, and llama.cpp reads no such bias of a qwen2",
    ),
    "width": (adapter_of(size=95), "llama", AdapterError, r"has \[95\] scales, the file \[96\]"),
    "path": (adapter_of("model.layers.9.mlp.up_proj"), "llama", AdapterError, r"no tensor for it"),
    "module": (
        adapter_of(modules={"lm_head.weight": np.ones((300, 64), np.float32)}),
        "llama",
        AdapterError,
        r"brings lm_head.weight whole",
    ),
    "task": (adapter_of(task="text-classification"), "llama", AdapterError, r"is for text-classif"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_file_has_no_place_for_is_refused(case, saved, tmp_path):
    adapter, kind, error, message = REFUSED[case]
    file, _ = toy(tmp_path, kind)

    with pytest.raises(error, match=message):
        merged(tmp_path, saved(adapter), file)

    assert not list(tmp_path.glob("*merged*"))


def test_a_product_out_of_range_names_the_channel_of_the_adapter(saved, tmp_path):
    file, _ = toy(tmp_path, "llama", "Q4_0")
    values = np.ones(64)
    values[1] = 1e9
    adapter = saved(Adapter("tuned", {"model.layers.0.self_attn.q_proj": Scale(values)}))

    with pytest.raises(AdapterError, match=r"blk.0.attn_q.weight, channel 1, block 0: .*--allow-"):
        merged(tmp_path, adapter, file)
    said = []
    written = merged(
        tmp_path, adapter, file, allow_range=True, progress=lambda _, text: said.append(text)
    )
    assert (
        "Tensors with the nearest numbers: 1, the first blk.0.attn_q.weight, channel 1" in said[-1]
    )

    assert all(torch.isfinite(values).all() for values in weights(written).values())


QUANTISED = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1", "Q4_K", "Q6_K", "Q3_K", "Q2_K"]
QUANTISED += ["IQ4_NL", "IQ4_XS", "IQ3_S"]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}


@pytest.mark.parametrize("kind", QUANTISED)
def test_an_adapter_of_the_float_checkpoint_is_one_of_its_quantisations(kind, saved, tmp_path):
    file, model = toy(tmp_path, "llama", kind, **WIDE)
    own = saved(adapter_of(size=512, fingerprint=fingerprint_of_model(model)))
    other = fingerprint_of_model(tiny_language_model("llama", seed=5, **WIDE))
    stranger = saved(adapter_of(size=512, fingerprint=other.without(other.vectors)), "stranger")

    written = merged(tmp_path, own, file)

    recorded = gguf.GGUFReader(written).fields["propulsion.base_fingerprints"].contents()
    assert json.loads(recorded[0])["entries"]
    if kind != "IQ3_S":  # the entries of a code book do not tell models apart, their norms do
        with pytest.raises(BaseModelError, match="is not the base model of adapter stranger"):
            merge_gguf(stranger, tmp_path / "no.gguf", model=str(file))


def test_an_input_is_not_replaced_nor_a_file_of_others(saved, tmp_path):
    file, _ = toy(tmp_path)
    adapter, output = saved(adapter_of()), tmp_path / "merged.gguf"
    (tmp_path / "link.gguf").symlink_to(file)

    for same in (file, tmp_path / "link.gguf"):
        with pytest.raises(UsageError, match="an input of this command, expected a file"):
            merge_gguf(adapter, same, model=str(file), force=True)
    output.write_bytes(b"GGUF of others")
    with pytest.raises(UsageError, match="exists, expected a new file"):
        merge_gguf(adapter, output, model=str(file))
    with pytest.raises(UsageError, match="is no output of this command"):
        merge_gguf(adapter, output, model=str(file), force=True)
    output.unlink()
    merge_gguf(adapter, output, model=str(file))
    first = output.read_bytes()
    merge_gguf(adapter, output, model=str(file), force=True)
    assert output.read_bytes() == first


def test_a_full_disk_leaves_nothing(saved, tmp_path, monkeypatch):
    file, _ = toy(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("propulsion_export.merging.gguf.writing.copy_range", full)
    with pytest.raises(UsageError, match="no space left on the device; nothing was written"):
        merged(tmp_path, saved(adapter_of()), file)

    assert {path.name for path in tmp_path.iterdir()} == {"base.gguf", "tuned"}


def test_a_path_that_is_no_utf_8_is_recorded_in_escapes(saved, tmp_path):
    directory = tmp_path / os.fsdecode(b"caf\xe9")
    directory.mkdir()
    file, _ = toy(directory)

    found = read_header(merged(tmp_path, saved(adapter_of()), file))

    assert found.metadata["propulsion.bases"] == [str(tmp_path / "caf\\udce9" / "base.gguf")]


@pytest.mark.parametrize("call", ["pread", "copy_file_range"])
def test_a_read_error_is_that_of_the_base_model(call, saved, tmp_path, monkeypatch, capsys):
    file, _ = toy(tmp_path)
    words = ["merge", "-m", str(file), "-a", str(saved(adapter_of())), "-o"]

    def broken(*_):
        raise OSError(5, "Input/output error")

    for name in {call, "pread"}:  # where the kernel cannot copy, this process does
        monkeypatch.setattr(os, name, broken)
    with pytest.raises(SystemExit) as ended:
        main([*words, str(tmp_path / "merged.gguf")])

    assert ended.value.code == 4
    assert f"{file}: cannot be read (Input/output error)" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"base.gguf", "tuned"}


@pytest.mark.parametrize("call", ["pread", "copy_file_range"])
def test_a_file_that_is_shortened_while_it_is_read_is_refused(call, saved, tmp_path, monkeypatch):
    file, _ = toy(tmp_path)
    plain, size = getattr(os, call), read_header(file).sections.data + 1000

    def shortening(*given):
        os.truncate(file, size)
        return plain(*given)

    monkeypatch.setattr(os, call, shortening)
    with pytest.raises(BaseModelError, match=r"base\.gguf: has become shorter while it was read"):
        merged(tmp_path, saved(adapter_of()), file)

    assert {path.name for path in tmp_path.iterdir()} == {"base.gguf", "tuned"}


def test_the_command_imports_no_torch_and_inspect_says_what_was_merged(saved, tmp_path, capsys):
    file, _ = toy(tmp_path)
    words = ["merge", "-m", str(file), "-a", str(saved(adapter_of())), "-o"]
    words += [str(tmp_path / "merged.gguf"), "--json"]
    program = (
        "import sys\nfrom propulsion_export.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit as exit_:\n    assert not exit_.code\n"
        "assert not {'torch', 'transformers', 'onnx'} & sys.modules.keys()"
    )

    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "merged.gguf"), "--json"])

    (said,) = json.loads(capsys.readouterr().out)["merged"]
    assert (said["adapter"], said["base"]) == ("tuned", str(file))


def test_a_checkpoint_is_no_base_for_a_gguf_file(saved, tmp_path, capsys):
    base = tmp_path / "checkpoint"
    tiny_language_model("llama").save_pretrained(base)

    with pytest.raises(UsageError, match=r"is no GGUF file, expected one to write"):
        merge_gguf(saved(adapter_of()), tmp_path / "merged.gguf", model=str(base))
