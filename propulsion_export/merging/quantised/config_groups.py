"""Which group of a compressed-tensors configuration a module belongs to, by its name alone."""

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from propulsion_export.errors import BaseModelError

Strategy = Literal["tensor", "channel", "group", "tensor_group", "block"]
_STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
_REGULAR_EXPRESSION = "re:"


@dataclass(frozen=True)
class Weights:
    """How the weights of a group's modules are quantised.

    Attributes:
        bits: the width of a value.
        kind: `int` or `float`.
        strategy: which weights share a scale.
        group_size: inputs that share a scale, in the strategies of groups.
        block: outputs and inputs that share a scale, in the strategy of blocks.
        symmetric: whether there are no zero points.
    """

    bits: int
    kind: str
    strategy: Strategy
    group_size: int
    block: tuple[int, int]
    symmetric: bool


@dataclass(frozen=True)
class ConfigGroups:
    """The `config_groups` of a `quantization_config`."""

    settings: Mapping[str, Any]

    def weights(self, path: str) -> Weights:
        """How the weights of the module at `path` are quantised.

        Raises:
            BaseModelError: no group or several could have it, or the group is not understood.
        """
        return _weights(path, self._group(path)["weights"])

    def by_rows(self) -> dict[str, Any]:
        """The whole `quantization_config` with at least one scale for each row of a matrix."""
        changed = copy.deepcopy(dict(self.settings))
        for name, group in changed["config_groups"].items():
            if not isinstance(group, dict) or not group.get("weights"):
                continue
            weights = group["weights"]
            found = _weights(name, weights)
            if found.strategy == "tensor":
                weights["strategy"] = "channel"
            elif found.strategy == "block":
                weights["block_structure"] = [1, found.block[1]]
        return changed

    def _group(self, path: str) -> Mapping[str, Any]:
        """The group of a module; compressed-tensors prefers names to expressions to classes."""
        for targets in _ranked(path, self.settings.get("config_groups") or {}):
            if not targets:
                continue
            if any(group != targets[0] for group in targets):
                break
            if isinstance(targets[0], dict) and targets[0].get("weights"):
                return targets[0]
            break
        raise BaseModelError(
            f"{path}: the names in config_groups do not say how its weight is quantised, expected "
            "exactly one group with its scheme"
        )


def _ranked(path: str, groups: Mapping[str, Any]) -> Iterator[list[Any]]:
    """The groups that name the module; whose expressions match it; that name a class."""
    pairs = [
        (target, group)
        for group in groups.values()
        for target in (group.get("targets", ()) if isinstance(group, dict) else ())
    ]
    yield [group for target, group in pairs if target == path]
    yield [
        group
        for target, group in pairs
        if target.startswith(_REGULAR_EXPRESSION)
        and re.match(target.removeprefix(_REGULAR_EXPRESSION), path)
    ]
    classes = [
        (target, group)
        for target, group in pairs
        if "." not in target and not target.startswith(_REGULAR_EXPRESSION)
    ]
    # Without the model a module's class is unknown; all but a few quantised ones are Linear.
    yield [group for target, group in classes if target == "Linear"]
    yield [group for _, group in classes]


def _weights(where: str, settings: Mapping[str, Any]) -> Weights:
    size = settings.get("group_size")
    inferred = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = _strategy(where, settings.get("strategy") or inferred)
    rows, columns = settings.get("block_structure") or (0, 0)
    return Weights(
        int(settings.get("num_bits", 8)),
        str(settings.get("type", "int")),
        strategy,
        int(size or 0),
        (int(rows), int(columns)),
        bool(settings.get("symmetric", True)),
    )


def _strategy(where: str, name: str) -> Strategy:
    for strategy in _STRATEGIES:
        if name == strategy:
            return strategy
    raise BaseModelError(
        f"{where}: its weights are quantised by {name}, expected one of {', '.join(_STRATEGIES)}"
    )
