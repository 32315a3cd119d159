"""Give a graph's head as many labels as an adapter's has."""

from collections.abc import Iterator

import onnx_ir as ir


def resize_labels_(graph: ir.Graph, output: str, parameters: list[ir.Value], labels: int) -> None:
    """Change the last axis of an output, and of what leads to it from its head's parameters.

    Args:
        graph: the graph; the parameters have `labels` rows already.
        output: the name of the output whose last axis counts labels.
        parameters: the head's, as far as their first axis counts labels.
        labels: how many there are now.
    """
    logits = next((value for value in graph.outputs if value.name == output), None)
    room = None if logits is None or logits.shape is None else logits.shape[-1]
    if not isinstance(room, int) or room == labels:
        return
    seen: set[ir.Value] = set()
    for parameter in parameters:
        for value in _behind(parameter, seen):
            if value.shape is not None and len(value.shape) and value.shape[-1] == room:
                value.shape = ir.Shape([*value.shape[:-1], labels])


def _behind(value: ir.Value, seen: set[ir.Value]) -> Iterator[ir.Value]:
    """All values that are computed from a value."""
    for node, _ in value.uses():
        for output in node.outputs:
            if output not in seen:
                seen.add(output)
                yield output
                yield from _behind(output, seen)
