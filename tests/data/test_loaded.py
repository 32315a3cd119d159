"""What `datasets` loads keeps its texts as they stand in its files."""

import datasets
import pytest

from propulsion_export.data.loaded import is_saved, read_hub, read_saved
from propulsion_export.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_cells_of_a_csv_file_on_a_hub_stay_texts(tmp_path):
    # A directory, which `datasets` reads as it reads a data set of a hub.
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("text,label\nNA,01\n1e3,None\n")

    rows = [row for _, row in read_hub(tmp_path / "data")]

    assert rows == [{"text": "NA", "label": "01"}, {"text": "1e3", "label": "None"}]


def test_other_kinds_on_a_hub_keep_their_types(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "01", "label": 1}\n')

    assert [row for _, row in read_hub(tmp_path / "data")] == [{"text": "01", "label": 1}]


def test_classes_that_a_card_names_are_kept(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("text,label\na,1\nb,0\n")
    (tmp_path / "data" / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: label\n"
        "    dtype:\n      class_label:\n        names:\n          '0': ham\n"
        "          '1': spam\n---\n"
    )

    assert [row["label"] for _, row in read_hub(tmp_path / "data")] == ["spam", "ham"]


def test_only_the_split_for_training_is_read(tmp_path):
    one, two = (datasets.Dataset.from_dict({"text": [text]}) for text in ("a", "b"))
    datasets.DatasetDict({"test": two, "train": one}).save_to_disk(tmp_path / "both")
    datasets.DatasetDict({"test": two}).save_to_disk(tmp_path / "test")

    assert is_saved(tmp_path / "both")
    assert list(read_saved(tmp_path / "both")) == [("row 1", {"text": "a"})]
    with pytest.raises(DataError, match="has the splits test, expected 'train'"):
        read_saved(tmp_path / "test")


def test_a_damaged_data_set_is_one_line(tmp_path):
    (tmp_path / "state.json").write_text("{")

    with pytest.raises(DataError, match="`datasets` cannot load it"):
        read_saved(tmp_path)
