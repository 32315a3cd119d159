"""What a merge writes, tensor by tensor, and by which rule each is scaled. No torch."""

from dataclasses import dataclass
from typing import Literal

# How the values of a scale lie over a tensor:
#   rows             one for each row of a matrix
#   columns          one for each entry of the last axis of a matrix
#   norm             one for each entry of a vector
#   norm plus one    of a vector w whose norm multiplies by 1 + w: it becomes (1 + w) s - 1
#   bias             of a bias, or of the trained one that takes its place
#   trained bias     not at all: the trained bias takes the place of the stored one
#   expert           one for each row of a single expert's matrix
#   experts' rows    [experts, outputs] over a weight [experts, outputs, inputs]
#   experts' columns [experts, outputs] over a weight [experts, inputs, outputs]
Rule = Literal[
    "rows",
    "columns",
    "norm",
    "norm plus one",
    "bias",
    "trained bias",
    "expert",
    "experts' rows",
    "experts' columns",
]


@dataclass(frozen=True)
class Part:
    """The part of a parameter that one stored tensor holds.

    Attributes:
        key: the tensor's name in the checkpoint.
        parameter: the parameter's name in the model.
        name: the name to write the tensor under.
        expert: the index on the parameter's first axis; None if the tensor is the whole parameter.
        first: the tensor's first output channel in an expert's matrix.
        convertible: whether the parameter is these parts put together; if not, only transformers
            knows how it is computed from them, and the tensor can be copied but not folded.
    """

    key: str
    parameter: str
    name: str
    expert: int | None = None
    first: int = 0
    convertible: bool = True


@dataclass(frozen=True)
class Job:
    """One tensor to write.

    Attributes:
        name: the name to write it under.
        parameter: the parameter that it is, or is a part of.
        part: where it is stored; None if it comes from the adapter.
        rule: how it is scaled; None if it is not.
    """

    name: str
    parameter: str
    part: Part | None
    rule: Rule | None = None

    @property
    def path(self) -> str:
        """Of the scale: that of the module, or the name of an experts' parameter."""
        by_name = self.rule in ("expert", "experts' rows", "experts' columns")
        return self.parameter if by_name else self.parameter.rpartition(".")[0]
