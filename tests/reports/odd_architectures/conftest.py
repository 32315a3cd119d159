from dataclasses import replace

import numpy as np
import pytest
from odd_models import make
from tiny_models import make_random_adapter, save_tokenizer

from propulsion_export.adapters.scales import Scale
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model


@pytest.fixture
def checkpoint(tmp_path, write_adapter):
    """`checkpoint(kind, head, task)`: a base model and an adapter for it on disk."""

    def save(kind, head, task, **settings):
        base = tmp_path / "base"
        model = make(kind, head, **settings)
        model.save_pretrained(base)
        save_tokenizer(base, generative=task == "text-generation")
        made = make_random_adapter(model, 1, "one", task=task)
        positive = {path: Scale(np.abs(s.values)) for path, s in made.scales.items()}
        found = fingerprint_of_model(model)
        adapter = replace(made, scales=positive, base=str(base), fingerprint=found)
        return base, write_adapter(adapter, tmp_path / "one")

    return save
