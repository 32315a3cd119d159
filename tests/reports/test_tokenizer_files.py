"""A tokenizer file left behind, or not understood, makes a served model read other tokens."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from propulsion_export.base_model.tokenizer import files as tokenizer_files
from propulsion_export.base_model.tokenizer.fast import read_fast_tokenizer
from propulsion_export.base_model.tokenizer.reading import (
    copy_tokenizer,
    read_serving_tokenizer,
    read_tokenizer,
)
from propulsion_export.errors import ArtifactError, BaseModelError, UnavailableError

spm = pytest.importorskip("sentencepiece", reason="a SentencePiece model is trained")
transformers = pytest.importorskip("transformers", reason="tokenizers are loaded")

TEXTS = ["ba bo bi be", "da do di de", "ga go gi ge ba da", "the cat sat on a mat"] * 5
QUESTION = "ba bo the cat, da"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A SentencePiece model of at most 60 pieces."""
    prefix = tmp_path_factory.mktemp("pieces") / "toy"
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(prefix),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        unk_piece="[UNK]",
    )
    return prefix.with_suffix(".model")


def write_config(directory, **settings):
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def deberta(directory, pieces):
    """DeBERTa-v3 as it is published: `spm.model` alone."""
    shutil.copy(pieces, directory / "spm.model")
    write_config(directory, tokenizer_class="DebertaV2Tokenizer")


def marian(directory, pieces):
    for name in ("source.spm", "target.spm"):
        shutil.copy(pieces, directory / name)
    model = spm.SentencePieceProcessor(model_file=str(pieces))
    tokens = [model.id_to_piece(number) for number in range(4, model.get_piece_size())]
    vocabulary = {token: n for n, token in enumerate(("</s>", "<unk>", *tokens, "<pad>"))}
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    write_config(directory, tokenizer_class="MarianTokenizer", source_lang="en", target_lang="de")


def phobert(directory, pieces):
    words = ["b", "a", "ba", "ca", "t", "da", "th", "e", "o"]
    (directory / "vocab.txt").write_text("".join(f"{word} 1\n" for word in words))
    (directory / "bpe.codes").write_text("b a</w> 9\nd a</w> 8\nt h 7\n")
    write_config(directory, tokenizer_class="PhobertTokenizer")


def luke(directory, pieces):
    """A tokenizer of a class with a third file, beside the fast ones."""
    letters = [*"abcdeghot", "Ġ", ",", "ba"]
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {token: n for n, token in enumerate((*special, *letters))}
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "merges.txt").write_text("#version: 0.2\nb a\n")
    entities = {token: n for n, token in enumerate(("[PAD]", "[UNK]", "[MASK]", "[MASK2]", "Rome"))}
    (directory / "entity_vocab.json").write_text(json.dumps(entities))
    write_config(directory, tokenizer_class="LukeTokenizer")


KINDS = {"deberta-v2": deberta, "marian": marian, "phobert": phobert, "luke": luke}


@pytest.mark.parametrize("kind", KINDS)
def test_copied_tokenizer_reads_the_same_tokens(kind, pieces, tmp_path):
    source, copied = tmp_path / "source", tmp_path / "copied"
    source.mkdir()
    copied.mkdir()
    KINDS[kind](source, pieces)
    before = read_tokenizer(source)(QUESTION)["input_ids"]

    copy_tokenizer(str(source), copied)

    assert {file.name for file in copied.iterdir()} == {file.name for file in source.iterdir()}
    assert read_tokenizer(copied)(QUESTION)["input_ids"] == before
    assert len(set(before)) > 4


@pytest.mark.parametrize(
    ("kind", "lost"),
    [
        ("deberta-v2", "spm.model"),
        ("marian", "source.spm"),
        ("phobert", "bpe.codes"),
        ("luke", "merges.txt"),
    ],
)
def test_tokenizer_without_its_vocabulary_is_refused_and_the_file_named(
    kind, lost, pieces, tmp_path
):
    KINDS[kind](tmp_path, pieces)
    (tmp_path / lost).unlink()

    with pytest.raises(BaseModelError, match=lost) as found:
        read_tokenizer(tmp_path)
    with pytest.raises(ArtifactError, match=lost):
        read_serving_tokenizer(tmp_path)
    assert "no vocabulary" in str(found.value)


def test_list_of_files_has_all_that_transformers_classes_name():
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    classes = {name for name in TOKENIZER_MAPPING_NAMES.values() if name}
    named = {
        file
        for name in classes
        for file in tokenizer_files._vocab_files(tokenizer_files.class_called(name)).values()
    }

    assert named <= set(tokenizer_files.VOCABULARY_FILES)
    assert {"spm.model", "source.spm", "bpe.codes"} <= named


def test_files_that_only_an_own_class_names_are_copied_with_its_modules(pieces, tmp_path):
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "own.py").write_text(
        "from .helper import Base\n"
        "class Own(Base):\n    vocab_files_names = {'vocab_file': 'letters.txt'}\n"
    )
    (source / "helper.py").write_text("from transformers import PreTrainedTokenizer as Base\n")
    (source / "unrelated.py").write_text("")
    (source / "letters.txt").write_text("a\nb\n")
    write_config(source, tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})

    copy_tokenizer(str(source), tmp_path / "copied")

    copied = {
        file.relative_to(tmp_path / "copied").as_posix()
        for file in (tmp_path / "copied").rglob("*")
        if file.is_file()
    }
    assert copied == {
        "own.py", "helper.py", "letters.txt", "tokenizer_config.json", "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    }  # fmt: skip
    with pytest.raises(BaseModelError, match=r"own\.py.*--trust-remote-code"):
        read_tokenizer(tmp_path / "copied")


def test_path_that_leads_out_of_the_checkpoint_is_not_copied(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "secret.py").write_text("")
    write_config(source, auto_map={"AutoTokenizer": ["../secret.Own", None]})

    assert set(tokenizer_files.tokenizer_files(str(source))) == {"tokenizer_config.json"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json: is damaged"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: is damaged"),
        ("tokenizer.json", '{"model": 3}', r"tokenizer\.json, .*cannot be read"),
    ],
)
def test_damaged_file_is_named(name, content, said, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint(), tmp_path / "base")
    (tmp_path / "base" / name).write_text(content)

    with pytest.raises(BaseModelError, match=said):
        read_tokenizer(tmp_path / "base")


def test_truncated_sentencepiece_model_is_no_missing_package(pieces, tmp_path):
    deberta(tmp_path, pieces)
    whole = (tmp_path / "spm.model").read_bytes()
    (tmp_path / "spm.model").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(BaseModelError, match=r"spm\.model: is no SentencePiece model"):
        read_tokenizer(tmp_path)


def test_class_that_transformers_does_not_have_is_named(tmp_path):
    write_config(tmp_path, tokenizer_class="FutureTokenizer")
    (tmp_path / "vocab.json").write_text("{}")

    with pytest.raises(BaseModelError, match="FutureTokenizer, which the transformers installed"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(("kind", "package"), [("deberta-v2", "sentencepiece"),
                                               ("marian", "sacremoses")])  # fmt: skip
def test_package_that_is_not_installed_is_named(kind, package, pieces, tmp_path):
    KINDS[kind](tmp_path, pieces)
    code = (
        "import sys, importlib.abc\n"
        "class Hidden(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == sys.argv[2]:\n"
        "            raise ModuleNotFoundError(name=name)\n"
        "import importlib.util as util\n"
        "real = util.find_spec\n"
        "hidden = lambda name, *rest: None if name == sys.argv[2] else real(name, *rest)\n"
        "util.find_spec = hidden\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "from propulsion_export.base_model.tokenizer.reading import read_tokenizer\n"
        "from propulsion_export.errors import UnavailableError\n"
        "try:\n    read_tokenizer(sys.argv[1])\n"
        "except UnavailableError as error:\n    print(error)\n"
    )

    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), package],
        capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert f"pip install {package}." in found.stdout


def test_tokenizer_without_any_file_is_none(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint(), tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).unlink()

    assert read_tokenizer(tmp_path / "base") is None
    assert read_serving_tokenizer(tmp_path / "base") is None


@pytest.fixture
def base_with(tiny_checkpoint, tmp_path):
    """`base_with(kind, write)`: a tiny checkpoint whose tokenizer `write` makes."""

    def make(kind, write, pieces):
        base = tmp_path / "base"
        shutil.copytree(tiny_checkpoint(kind), base)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (base / name).unlink()
        write(base, pieces)
        return base

    return make


def test_deberta_with_spm_model_alone_is_merged_exported_and_run(
    base_with, pieces, tiny_model, positive_adapter, write_adapter, tmp_path
):
    import torch

    from propulsion_export.pipeline.merge import merge
    from propulsion_export.pipeline.onnx import export_onnx
    from propulsion_export.serving.session import Session

    base = base_with("deberta-v2", deberta, pieces)
    adapter = positive_adapter(tiny_model("deberta-v2"), task="text-classification")
    write_adapter(replace(adapter, base=str(base)), tmp_path / "tuned")
    merge(tmp_path / "tuned", tmp_path / "merged")
    export_onnx([tmp_path / "tuned"], tmp_path / "onnx")

    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")(QUESTION)["input_ids"]
    with torch.no_grad():
        expected = merged.eval()(torch.tensor([tokens])).logits[0].numpy()
    (reply,) = Session(tmp_path / "onnx")([QUESTION])
    assert len(set(tokens)) > 4
    np.testing.assert_allclose(reply.outputs["logits"], expected, atol=1e-4)


def test_export_of_a_base_without_its_vocabulary_is_refused(
    base_with, pieces, tiny_model, positive_adapter, write_adapter, tmp_path
):
    from propulsion_export.pipeline.onnx import export_onnx

    base = base_with("deberta-v2", deberta, pieces)
    (base / "spm.model").unlink()
    write_adapter(replace(positive_adapter(tiny_model("deberta-v2")), base=str(base)),
                  tmp_path / "tuned")  # fmt: skip

    with pytest.raises(BaseModelError, match=r"spm\.model"):
        export_onnx([tmp_path / "tuned"], tmp_path / "onnx")

    assert not (tmp_path / "onnx").exists()
    with pytest.raises(BaseModelError, match=r"spm\.model"):
        export_onnx([], tmp_path / "bare", model=str(base), mode="switchable",
                    task="text-classification")  # fmt: skip


@pytest.fixture
def translator(pieces, tmp_path):
    """A Marian model, which never saves its positions, with its tokenizer."""
    import torch

    base = tmp_path / "marian"
    base.mkdir()
    marian(base, pieces)
    count = len(json.loads((base / "vocab.json").read_text()))
    config = transformers.MarianConfig(
        vocab_size=count, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=37,
        decoder_ffn_dim=37, max_position_embeddings=40, pad_token_id=count - 1, eos_token_id=0,
        decoder_start_token_id=count - 1, forced_eos_token_id=None, init_std=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.MarianMTModel(config).save_pretrained(base)
    return base


def test_marian_is_merged_and_its_graph_writes_what_transformers_does(
    translator, positive_adapter, write_adapter, tmp_path
):
    from propulsion_export.pipeline.merge import merge
    from propulsion_export.pipeline.onnx import export_onnx
    from propulsion_export.serving.generation import Settings
    from propulsion_export.serving.session import Session

    model = transformers.MarianMTModel.from_pretrained(translator)
    made = positive_adapter(model, task="text2text-generation", embeddings=False)
    write_adapter(replace(made, base=str(translator)), tmp_path / "tuned")
    merge(tmp_path / "tuned", tmp_path / "merged")
    export_onnx([tmp_path / "tuned"], tmp_path / "onnx")

    merged = transformers.MarianMTModel.from_pretrained(tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    inputs = tokenizer(QUESTION, return_tensors="pt")
    expected = merged.generate(**inputs, max_new_tokens=8, num_beams=1, do_sample=False)[0, 1:]
    (reply,) = Session(tmp_path / "onnx")([QUESTION], settings=Settings(new_tokens=8))
    assert list(reply.prediction["tokens"]) == [n for n in expected.tolist() if n != 0]
    assert reply.prediction["generated"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_merged_bart_may_lack_what_transformers_does_not_miss(make_world, tmp_path):
    from safetensors.torch import load_file, save_file

    from propulsion_export.pipeline.merge import merge

    world = make_world("bart")
    shutil.copytree(world.base, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = {name: value for name, value in load_file(file).items() if "logits_bias" not in name}
    save_file(tensors, file, metadata={"format": "pt"})

    merge(world.one, tmp_path / "merged", model=str(tmp_path / "base"))
    merge(world.one, tmp_path / "twin")

    lacking = load_file(tmp_path / "merged" / "model.safetensors")
    whole = load_file(tmp_path / "twin" / "model.safetensors")
    assert whole.keys() - lacking.keys() == {"final_logits_bias"}
    assert all((lacking[name] == whole[name]).all() for name in lacking)


def test_scale_on_positions_that_are_never_saved_is_refused(
    translator, positive_adapter, write_adapter, tmp_path
):
    from propulsion_export.pipeline.merge import merge

    model = transformers.MarianMTModel.from_pretrained(translator)
    made = positive_adapter(model, task="text2text-generation", tied=True, only="embed_positions")
    write_adapter(replace(made, base=str(translator)), tmp_path / "tuned")

    with pytest.raises(BaseModelError, match="embed_positions"):
        merge(tmp_path / "tuned", tmp_path / "merged")


def test_packages_carry_the_files_too(folded, tmp_path):
    from propulsion_export.artifacts.artifact import Artifact
    from propulsion_export.packaging.triton import _is_of_client

    directory = tmp_path / "artifact"
    shutil.copytree(folded, directory)
    names = ("spm.model", "own.py", "additional_chat_templates/tools.jinja")
    (directory / "additional_chat_templates").mkdir()
    for name in names:
        (directory / name).write_text("x")
    artifact = Artifact.write(directory, Artifact.read(folded).manifest)

    assert set(names) <= set(filter(_is_of_client, artifact.manifest.files))


def test_missing_package_has_the_code_of_a_machine_that_cannot():
    assert (UnavailableError.exit_code, BaseModelError.exit_code) == (3, 4)


@pytest.mark.parametrize("files", [["tokenizer.1.0.0.json"], ["tokenizer.4.0.0.json", "x.json"]])
def test_a_tokenizer_in_another_file_is_read_by_transformers(files, tiny_checkpoint, tmp_path):
    """transformers picks a file by its own version, which serving does not know."""
    directory = shutil.copytree(tiny_checkpoint("bert", "feature-extraction"), tmp_path / "base")
    file = directory / "tokenizer_config.json"
    before = read_fast_tokenizer(directory)
    file.write_text(json.dumps({**json.loads(file.read_text()), "fast_tokenizer_files": files}))

    assert before is not None
    assert read_fast_tokenizer(directory) is None
