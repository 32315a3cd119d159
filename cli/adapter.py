"""`propulsion-export adapter`: change the adapters of a switchable artifact or a bank."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .console import Console, console_options, human_size
from .options import DIRECTORY

if TYPE_CHECKING:
    from propulsion_export.artifacts.artifact import Artifact


@click.group(epilog="\b\nExample: propulsion-export adapter list onnx/bank")
def command() -> None:
    """Add, remove and list adapters of a switchable artifact or a bank, without tracing again."""


@command.command(epilog="\b\nExample: propulsion-export adapter add onnx/bank pos=adapters/pos")
@click.argument("artifact", metavar="DIR", type=DIRECTORY)
@click.argument("adapter", metavar="[NAME=]ADAPTER")
@click.option("--allow-range", is_flag=True, help="Accept scales that the dtype rounds badly.")
@click.option("--force", is_flag=True, help="Replace an adapter of the same name.")
@console_options
def add(console: Console, artifact: Path, adapter: str, allow_range: bool, force: bool) -> None:
    """Add an adapter to a switchable artifact or a bank.

    Adding to a bank takes the same time however many adapters it has.
    """
    from propulsion_export.artifacts.changing import add_adapter

    _print_adapters(console, add_adapter(artifact, adapter, allow_range=allow_range, force=force))


@command.command(epilog="\b\nExample: propulsion-export adapter remove onnx/bank pos")
@click.argument("artifact", metavar="DIR", type=DIRECTORY)
@click.argument("name")
@console_options
def remove(console: Console, artifact: Path, name: str) -> None:
    """Remove an adapter from a switchable artifact or a bank.

    A bank keeps its row, which running processes may read, until `adapter compact`.
    """
    from propulsion_export.artifacts.changing import remove_adapter

    _print_adapters(console, remove_adapter(artifact, name))


@command.command(epilog="\b\nExample: propulsion-export adapter compact onnx/bank")
@click.argument("artifact", metavar="DIR", type=DIRECTORY)
@console_options
def compact(console: Console, artifact: Path) -> None:
    """Free the space of a bank's removed and replaced adapters.

    Ids change: programs that feed ids without this library must look them up again.
    """
    from propulsion_export.artifacts.changing import compact_bank

    freed = compact_bank(artifact)
    console.result({"freed": freed}, f"{artifact}: {human_size(freed)} freed")


@command.command("list", epilog="\b\nExample: propulsion-export adapter list onnx/bank")
@click.argument("artifact", metavar="DIR", type=DIRECTORY)
@console_options
def list_(console: Console, artifact: Path) -> None:
    """List the adapters of an artifact, and for a bank the id of each."""
    from propulsion_export.artifacts.artifact import Artifact

    read = Artifact.read(artifact)
    ids = {}
    if read.manifest.mode == "bank":
        rows = read.open_bank().rows()
        entries = {name: row.entry for name, row in rows.items()}
        ids = {name: {"id": row.number} for name, row in rows.items()}
    else:
        entries = dict(sorted(read.manifest.adapters.items()))
    value = {
        name: {
            "scales": entry.size,
            "labels": entry.labels,
            "problem_type": entry.problem_type,
            "digest": entry.digest,
            **ids.get(name, {}),
        }
        for name, entry in entries.items()
    }
    table = [
        (
            name,
            *map(str, ids.get(name, {}).values()),
            f"{entry.size:,}",
            ", ".join(entry.labels or ()),
            entry.digest[7:19],
        )
        for name, entry in entries.items()
    ]
    heads = ("name", *(("id",) if ids else ()), "scales", "labels", "digest")
    console.result({"adapters": value}, "" if console.json else console.table(heads, table))


def _print_adapters(console: Console, changed: "Artifact") -> None:
    """Print the adapters after a change; for a bank, which may have very many, their number."""
    if changed.manifest.mode == "bank":
        count = len(changed.open_bank())
        noun = "adapter" if count == 1 else "adapters"
        console.result({"count": count}, f"{changed.shown}: {count:,} {noun}")
        return
    names = sorted(changed.manifest.adapters)
    console.result({"adapters": names}, f"{changed.shown}: {', '.join(names)}")
