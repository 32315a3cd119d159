"""`propulsion-export doctor`: what this machine can do."""

import click

from .console import Console, console_options


@click.command(epilog="\b\nExample: propulsion-export doctor --json")
@console_options
def command(console: Console) -> None:
    """Show what this machine can do, what is missing, and how to get it."""
    from propulsion_export.environment.machine import capabilities, cuda_devices, tool_versions

    found = capabilities()
    rows = [
        ("yes" if item.available else "no", item.name, item.detail, item.remedy) for item in found
    ]
    versions = tool_versions()
    value = {
        "capabilities": [
            {"name": i.name, "available": i.available, "detail": i.detail, "remedy": i.remedy}
            for i in found
        ],
        "gpus": [device.name for device in cuda_devices()],
        "versions": versions,
    }
    tools = ", ".join(f"{name} {version}" for name, version in versions.items())
    console.result(value, console.table(("here", "step", "with", "remedy"), rows) + "\n" + tools)
