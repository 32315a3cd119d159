"""The card says what was trained and how to use it; the picture is one."""

import re
import struct
import zlib

import pytest
from huggingface_hub import ModelCard

from propulsion_export.training import TrainOptions, train
from propulsion_export.training.card import model_card, write_loss_curve


@pytest.fixture(name="trained", scope="session")
def make_trained(tiny_base, texts, held_out_texts, tmp_path_factory):
    options = TrainOptions(validation=held_out_texts, epochs=2, batch_size=16)
    return train(tiny_base, texts, tmp_path_factory.mktemp("out") / "topics", options=options)


def test_the_card_states_base_labels_counts_and_both_accuracies(trained):
    card = (trained.directory / "README.md").read_text(encoding="utf-8")
    metrics = trained.metrics

    assert f"- Base model: `{metrics['base_model']}`, in float32" in card
    assert "- Labels: `animal`, `food`, `place`" in card
    assert "- Trained numbers: 576 in vectors, 99 in head" in card
    assert (
        f"Validation accuracy {metrics['validation_accuracy']:.4f} (epoch 2), against "
        f"{metrics['head_only_accuracy']:.4f} for the task head alone" in card
    )
    for command in ("merge", "onnx"):
        assert f"propulsion-export {command} -a " in card


@pytest.mark.parametrize(
    ("base", "named"),
    [("some/base", {"base_model": "some/base"}), ("/a/path/here", {})],
    ids=["hub", "local"],
)
def test_the_header_is_what_model_hubs_read(base, named, trained):
    yaml = pytest.importorskip("yaml", reason="comes with transformers")
    card = model_card({**trained.metrics, "base_model": base})

    header = yaml.safe_load(card.split("---\n")[1])

    assert ModelCard(card).data.to_dict() == header
    assert header == {
        "library_name": "peft",
        **named,
        "pipeline_tag": "text-classification",
        "tags": ["propulsion", "propulsion-export"],
        "metrics": ["accuracy"],
    }


def test_without_the_head_alone_the_card_compares_nothing(trained):
    card = model_card({**trained.metrics, "head_only_accuracy": None})

    assert re.search(r"Validation accuracy 0\.\d{4} \(epoch 2\)\.\n", card)


def test_the_card_shows_code_that_runs(trained):
    """What the card's Python block needs is there; the path is filled in."""
    card = (trained.directory / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)

    compile(code, "README.md", "exec")
    assert f'from_pretrained("{trained.metrics["base_model"]}", num_labels=3)' in code


def test_the_picture_shows_more_when_there_is_more_to_show(tmp_path):
    history = [{"epoch": 1, "validation_accuracy": 0.5}, {"epoch": 2, "validation_accuracy": 0.9}]
    metrics = {"task": "text-classification", "epochs": history}
    write_loss_curve(tmp_path / "empty.png", [], metrics | {"epochs": []})
    write_loss_curve(tmp_path / "curve.png", [(0.5, 2.0), (1.0, 1.5), (2.0, 0.5)], metrics)

    empty, curve = decode(tmp_path / "empty.png"), decode(tmp_path / "curve.png")
    assert len(curve) == len(empty)
    assert curve != empty


def decode(file):
    """The bytes of the rows of a PNG; every checksum is verified."""
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    position, data = 8, b""
    while position < len(content):
        length, kind = struct.unpack(">I4s", content[position : position + 8])
        body = content[position + 8 : position + 8 + length]
        (checksum,) = struct.unpack(">I", content[position + 8 + length : position + 12 + length])
        assert checksum == zlib.crc32(kind + body)
        data += body if kind == b"IDAT" else b""
        position += length + 12
    return zlib.decompress(data)
