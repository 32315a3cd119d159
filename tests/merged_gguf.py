"""What a GGUF file's model has with an adapter folded in, by torch."""

from gguf_files import tiny_language_model, write_gguf

from propulsion_export.base_model.loading import load_base
from propulsion_export.scaling.fold.model import fold_

TASK = "text-generation"


def weights(file):
    return load_base(str(file), task=TASK).model.state_dict()


def folded(file, adapter, *, untie=False):
    """The weights that a file's model has with an adapter folded in by torch."""
    model = load_base(str(file), task=TASK).model
    fold_(model, adapter, untie=untie)
    return model.state_dict()


def toy(directory, kind="llama", quantisation=None, **settings):
    """A tiny model's file and the model."""
    keys = settings.pop("keys", ())
    model = tiny_language_model(kind, **settings)
    file = write_gguf(directory / "base.gguf", model, quantisation=quantisation, keys=keys)
    return file, model
