"""`propulsion-export inspect`: what an adapter, artifact or engine is."""

import json
from pathlib import Path
from typing import Any

import click

from .console import Console, console_options, human_size, size_of
from .options import DIRECTORY


@click.command(epilog="\b\nExample: propulsion-export inspect adapters/topic")
@click.argument("path", metavar="PATH", type=DIRECTORY)
@console_options
def command(console: Console, path: Path) -> None:
    """Describe an adapter, artifact or engine."""
    from propulsion_export.adapters.adapter import Adapter
    from propulsion_export.adapters.peft_directory import PEFT_CONFIG
    from propulsion_export.artifacts.artifact import Artifact
    from propulsion_export.artifacts.file_names import MANIFEST_FILE
    from propulsion_export.base_model.generation_settings import GenerationSettings
    from propulsion_export.base_model.tasks import TASKS
    from propulsion_export.errors import ArtifactError

    if not path.is_dir():
        raise ArtifactError(f"{path}: does not exist, expected a directory")
    if (path / MANIFEST_FILE).is_file():
        artifact = Artifact.read(path)
        value = json.loads(artifact.manifest.to_json())
        del value["base"]["fingerprint"], value["files"]
        if TASKS[artifact.manifest.task].generates:
            settings = GenerationSettings.read(path)
            value["generation"] = {
                "applied": settings.applied(),
                "not_applied": settings.not_applied(),
            }
        if artifact.manifest.mode == "bank":
            bank = artifact.open_bank()
            file = bank.find_file().name
            value["adapters"] = {"count": len(bank), "width": bank.width, "file": file}
    elif (path / PEFT_CONFIG).is_file():
        value = _describe(Adapter.read(path))
    else:
        raise ArtifactError(
            f"{path}: holds neither {MANIFEST_FILE} nor {PEFT_CONFIG}, expected an artifact or an "
            "adapter"
        )
    console.result(value, f"{path} ({human_size(size_of(path))})\n" + _text(value))


def _describe(adapter: Any) -> dict[str, Any]:
    return {
        "kind": "adapter",
        "name": adapter.name,
        "task": adapter.task,
        "labels": adapter.labels,
        "model_settings": dict(adapter.model_settings),
        "tokenizer_settings": dict(adapter.tokenizer_settings),
        "base": adapter.base,
        "base_fingerprint": adapter.fingerprint is not None,
        "digest": adapter.digest,
        "scales": adapter.size,
        "biases": sum(bias.size for bias in adapter.biases.values()),
        "modules": {name: list(values.shape) for name, values in adapter.modules.items()},
        "modules_scaled": {
            path: {
                "side": scale.side,
                "shape": list(scale.values.shape),
                "smallest": float(scale.values.min()),
                "largest": float(scale.values.max()),
            }
            for path, scale in adapter.scales.items()
        },
    }


def _text(value: dict[str, Any]) -> str:
    lines = []
    for key, item in value.items():
        if key == "modules_scaled":
            lines += [
                f"  {path}: {'x'.join(map(str, scale['shape']))} {scale['side']} scales in "
                f"[{scale['smallest']:.4g}, {scale['largest']:.4g}]"
                for path, scale in item.items()
            ]
        elif key == "layout":
            lines += [f"{name}: {len(slots)} slots" for name, slots in item.items()]
        elif key == "graphs":
            for name, graph in item.items():
                lines += [f"{name}: {line}" for line in _text(graph).splitlines()]
        elif key in ("inputs", "outputs"):
            lines += [f"{key[:-1]} {_tensor(tensor)}" for tensor in item]
        else:
            lines.append(f"{key}: {item if isinstance(item, str | int) else json.dumps(item)}")
    return "\n".join(lines)


def _tensor(tensor: dict[str, Any]) -> str:
    optional = ", optional" if tensor["optional"] else ""
    return f"{tensor['name']}: {tensor['dtype']} {tensor['shape']}{optional}"
