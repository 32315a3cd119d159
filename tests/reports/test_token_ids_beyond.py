"""A token beyond the model's embedding fails on the first text with it, or reads other memory."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.tokenizer.token_ids import check_token_ids, embedding_rows
from propulsion_export.errors import ArtifactError, BaseModelError, UsageError
from propulsion_export.serving.session import Session

transformers = pytest.importorskip("transformers", reason="tokenizers are loaded")

TOKENS = ["<one>", "<two>"]


def add_tokens(directory, tokens=TOKENS, **settings):
    """Add tokens to the tokenizer in a directory, as people do who forget to resize the model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens([transformers.AddedToken(token, special=True) for token in tokens])
    tokenizer.save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture
def base(tiny_checkpoint, tmp_path):
    """A checkpoint of 100 embeddings whose tokenizer has the numbers 100 and 101 too."""
    shutil.copytree(tiny_checkpoint(), tmp_path / "base")
    add_tokens(tmp_path / "base")
    return tmp_path / "base"


def test_training_refuses_them_and_names_them(base, tmp_path):
    from propulsion_export.training.model import load_trainable
    from propulsion_export.training.options import TrainOptions

    options = TrainOptions(task="text-classification")

    with pytest.raises(BaseModelError, match=r"'<one>' \(100\), '<two>' \(101\).*100 embeddings"):
        load_trainable(base, ("no", "yes"), options)


def test_export_refuses_them_before_any_work(base, tmp_path):
    from propulsion_export.pipeline.onnx import export_onnx

    with pytest.raises(BaseModelError, match="'<one>'"):
        export_onnx([], tmp_path / "onnx", model=str(base), mode="folded")

    assert not (tmp_path / "onnx").exists()


def test_parity_of_texts_refuses_them(base, tmp_path):
    from propulsion_export.base_model.loading import load_base
    from propulsion_export.parity.inputs import make_batches

    (tmp_path / "texts.txt").write_text("ba\n" * 16)

    with pytest.raises(BaseModelError, match="'<one>'"):
        make_batches(load_base(str(base), task="text-classification"), tmp_path / "texts.txt", 0,
                     short=False)  # fmt: skip


@pytest.fixture
def with_tokens(tmp_path):
    """`with_tokens(artifact)`: a copy of an artifact whose tokenizer has more tokens."""

    def make(artifact, tokens=TOKENS, **settings):
        directory = tmp_path / "changed"
        shutil.copytree(artifact, directory)
        manifest = Artifact.read(artifact).manifest
        (directory / "serving_tokenizer.json").unlink(missing_ok=True)
        add_tokens(directory, tokens, **settings)
        Artifact.write(directory, manifest)
        return directory

    return make


def test_session_refuses_them_and_its_twin_answers(folded, with_tokens):
    with pytest.raises(ArtifactError, match=r"'<one>' \(100\)"):
        Session(with_tokens(folded))(["ba"])
    assert Session(folded)(["ba"])[0].outputs["logits"].shape == (3,)


def test_token_for_an_image_is_refused_only_in_a_text(folded, with_tokens):
    changed = with_tokens(folded, ["<image_soft_token>"], image_token="<image_soft_token>")
    (expected,) = Session(folded)(["ba"])

    (reply,) = Session(changed)(["ba"])

    np.testing.assert_array_equal(reply.outputs["logits"], expected.outputs["logits"])
    with pytest.raises(UsageError, match="the token 100"):
        Session(changed)(["ba <image_soft_token>"])


def test_padding_token_beyond_the_embedding_is_refused_whatever_its_role(folded, with_tokens):
    changed = with_tokens(folded, ["<pad>"], pad_token="<pad>")

    with pytest.raises(ArtifactError, match=r"'<pad>' \(100\)"):
        Session(changed)(["ba"])


class Spelled:
    """A tokenizer that is not a fast one."""

    def get_vocab(self):
        return {"a": 0, "b": 7}


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"vocab_size": 8}, 8),
        ({"model_type": "xlm", "n_words": 8}, 8),
        ({"model_type": "fsmt", "src_vocab_size": 8, "vocab_size": 5, "tgt_vocab_size": 5}, 8),
        ({"model_type": "gemma3", "text_config": {"vocab_size": 8}}, 8),
        ({"model_type": "canine"}, None),
    ],
)
def test_number_of_embeddings_is_read_under_every_name(settings, rows, tmp_path):
    assert embedding_rows(settings) == rows
    check_token_ids(str(tmp_path), Spelled(), settings)
    fewer = json.loads(json.dumps(settings).replace("8", "7"))
    if rows:
        with pytest.raises(BaseModelError, match=r"the token 'b' \(7\)"):
            check_token_ids(str(tmp_path), Spelled(), fewer)


def test_many_tokens_are_counted(tmp_path):
    many = SimpleNamespace(get_vocab=lambda: {f"<{n}>": n for n in range(200)})

    with pytest.raises(BaseModelError, match=r"'<103>' \(103\) and 96 more, expected"):
        check_token_ids(str(tmp_path), many, {"vocab_size": 100})


def test_no_configuration_names_its_embeddings_otherwise():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    renamed = {}
    for kind in CONFIG_MAPPING_NAMES:
        names = getattr(CONFIG_MAPPING[kind], "attribute_map", {})
        renamed |= {kind: names["vocab_size"]} if "vocab_size" in names else {}

    assert renamed == {"fsmt": "tgt_vocab_size"}  # its encoder's is src_vocab_size
