"""A model that lies in a hub's cache is read in seconds where no hub answers."""

import os
import shutil
import subprocess
import sys

READ = """
import sys
from propulsion_export.base_model import hub
from propulsion_export.base_model.config import read_config
from propulsion_export.base_model.loading import load_base
from propulsion_export.base_model.tokenizer.reading import read_tokenizer
import huggingface_hub.utils._http as http
hub.check_findable("owner/model")
def refuse(*_, **__):
    sys.exit("asked the hub again")
http.get_session().send = refuse
print(read_config("owner/model").model_type, len(read_tokenizer("owner/model")))
print(type(load_base("owner/model", task="text-classification").model).__name__)
"""
REVISION = "1" * 40


def test_a_cached_model_is_read_without_asking_the_hub_again(tiny_checkpoint, tmp_path):
    repository = tmp_path / "hub/models--owner--model"
    shutil.copytree(tiny_checkpoint(), repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(REVISION)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}

    done = subprocess.run(
        [sys.executable, "-c", READ],
        env=kept | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:1"},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout == "bert 100\nBertForSequenceClassification\n"
