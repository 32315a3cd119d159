"""The parameters in a GGUF file as if they were stored in float32; each is computed when read."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from propulsion_export.base_model.gguf.weights import GgufTensor, gguf_tensors
from propulsion_export.base_model.tensor_files import Array, StoredTensor


@dataclass(frozen=True)
class UnpackedTensor(StoredTensor):
    """A parameter that tensors of a GGUF file make; `offset` means nothing."""

    tensor: GgufTensor | None = field(default=None, repr=False)

    def read(self) -> Array:
        """The whole parameter, float32, in memory of its own."""
        assert self.tensor is not None
        values: Array = self.tensor.read().numpy()
        return values

    def blocks(self, count: int) -> Iterator[Array]:
        """Its values, flat, `count` at a time, of a whole that is computed first."""
        values = self.read().reshape(-1)
        for first in range(0, values.size, count):
            yield values[first : first + count]

    def __getitem__(self, place: tuple[int, ...]) -> float:
        """One entry, by its position on every axis."""
        assert self.tensor is not None
        return float(self.tensor[place])


def unpacked_tensors(source: str) -> dict[str, StoredTensor]:
    """The parameters of the language model in a GGUF file, by transformers' names.

    Raises:
        BaseModelError: the source means no GGUF file that `gguf_tensors` accepts.
    """
    return {
        name: UnpackedTensor(tensor.header.file, 0, tensor.shape, "F32", tensor)
        for name, tensor in (gguf_tensors(source) or {}).items()
    }
