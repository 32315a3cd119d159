"""Find the parameters of a GGUF file's language model by name, without building the model."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.gguf.configuration import OUTPUT, model_settings
from propulsion_export.base_model.gguf.entries import FileTensor, conversion_for
from propulsion_export.base_model.gguf.header import Header, read_header
from propulsion_export.base_model.gguf.names import name_map, tensor_names
from propulsion_export.base_model.gguf.values import read_factors


@dataclass(frozen=True)
class Parameters:
    """What a GGUF file has for each parameter of its model.

    Attributes:
        header: of the file.
        settings: what its metadata says, in the words of config.json.
        names: llama.cpp's table of names.
    """

    header: Header
    settings: Mapping[str, Any] = field(repr=False)
    names: Any = field(repr=False)

    @classmethod
    def of(cls, header: Header) -> "Parameters":
        """The parameters in a file.

        Raises:
            BaseModelError: the file is refused for what it says of itself.
        """
        settings = model_settings(header, partial(read_factors, header))
        return cls(header, settings, name_map(header))

    def find(self, parameter: str) -> FileTensor | None:
        """A parameter by transformers' name of it; None if the file has no tensor for it."""
        names = tensor_names(self.names, parameter)
        if not names or any(name not in self.header.tensors for name in names):
            return None
        conversion = conversion_for(self.header.architecture, names, self.settings)
        shape = conversion.shape([self.header.tensors[name].shape for name in names])
        return FileTensor(self.header, names, conversion, shape)

    def tensor_name(self, parameter: str) -> str | None:
        """The name that a parameter's only tensor has, whether or not the file has it."""
        names = tensor_names(self.names, parameter)
        return names[0] if len(names) == 1 else None

    @property
    def is_tied(self) -> bool:
        """Whether the token embedding is the output too."""
        return OUTPUT not in self.header.tensors

    def fingerprint(self, names: Collection[str]) -> Fingerprint:
        """The fingerprint of the parameters with these names; those the file lacks are left out."""
        found = {name: self.find(name) for name in names}
        return Fingerprint.of({name: tensor for name, tensor in found.items() if tensor})


def with_steps(fingerprint: Fingerprint, file: Path) -> Fingerprint:
    """A fingerprint of a model loaded from a GGUF file, with the steps of the file's grids.

    Another quantisation of the same model is recognised by it.
    """
    parameters = Parameters.of(read_header(file))
    return replace(fingerprint, steps=parameters.fingerprint(fingerprint.entries).steps)
