"""`propulsion-export adapter`: change what a switchable artifact can switch to."""

from pathlib import Path

import click

from .console import Console, console_options
from .options import DIRECTORY


@click.group(epilog="\b\nExample: propulsion-export adapter list onnx/switchable")
def command() -> None:
    """Add, remove and list a switchable artifact's adapters, without tracing again."""


@command.command(
    epilog="\b\nExample: propulsion-export adapter add onnx/switchable pos=adapters/pos"
)
@click.argument("artifact", metavar="DIR", type=DIRECTORY)
@click.argument("adapter", metavar="[NAME=]ADAPTER")
@click.option("--allow-range", is_flag=True, help="Accept scales that the dtype rounds badly.")
@click.option("--force", is_flag=True, help="Replace an adapter of that name.")
@console_options
def add(console: Console, artifact: Path, adapter: str, allow_range: bool, force: bool) -> None:
    """Add an adapter to a switchable artifact."""
    from propulsion_export.pipeline.adapters import add_adapter

    changed = add_adapter(artifact, adapter, allow_range=allow_range, force=force)
    names = sorted(changed.manifest.adapters)
    console.result({"adapters": names}, f"{artifact}: {', '.join(names)}")


@command.command(epilog="\b\nExample: propulsion-export adapter remove onnx/switchable pos")
@click.argument("artifact", metavar="DIR", type=DIRECTORY)
@click.argument("name")
@console_options
def remove(console: Console, artifact: Path, name: str) -> None:
    """Take an adapter out of a switchable artifact."""
    from propulsion_export.pipeline.adapters import remove_adapter

    changed = remove_adapter(artifact, name)
    names = sorted(changed.manifest.adapters)
    console.result({"adapters": names}, f"{artifact}: {', '.join(names)}")


@command.command("list", epilog="\b\nExample: propulsion-export adapter list onnx/switchable")
@click.argument("artifact", metavar="DIR", type=DIRECTORY)
@console_options
def list_(console: Console, artifact: Path) -> None:
    """List an artifact's adapters."""
    from propulsion_export.artifact import Artifact

    entries = Artifact.read(artifact).manifest.adapters
    rows = [
        (name, f"{entry.size:,}", ", ".join(entry.labels or ()), entry.digest[7:19])
        for name, entry in sorted(entries.items())
    ]
    value = {
        name: {"scales": entry.size, "labels": entry.labels, "digest": entry.digest}
        for name, entry in sorted(entries.items())
    }
    console.result({"adapters": value}, console.table(("name", "scales", "labels", "digest"), rows))
