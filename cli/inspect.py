"""`propulsion-export inspect`: what an adapter, artifact, engine or GGUF file is."""

import json
import math
from pathlib import Path
from typing import Any

import click

from .console import Console, console_options, human_size, size_of
from .options import HomePath


@click.command(epilog="\b\nExample: propulsion-export inspect adapters/topic")
@click.argument("path", metavar="PATH", type=HomePath())
@console_options
def command(console: Console, path: Path) -> None:
    """Describe an adapter, artifact, engine or GGUF file."""
    from propulsion_export.adapters.adapter import Adapter
    from propulsion_export.adapters.peft_directory import PEFT_CONFIG
    from propulsion_export.artifacts.artifact import Artifact
    from propulsion_export.artifacts.file_names import MANIFEST_FILE
    from propulsion_export.base_model.generation_settings import GenerationSettings
    from propulsion_export.base_model.gguf.source import find_gguf
    from propulsion_export.base_model.tasks import TASKS
    from propulsion_export.errors import ArtifactError

    if not path.is_dir() and find_gguf(path) is None:
        found = "is a file" if path.exists() else "does not exist"
        raise ArtifactError(f"{path}: {found}, expected a directory or a GGUF file")
    if (path / MANIFEST_FILE).is_file():
        artifact = Artifact.read(path)
        value = json.loads(artifact.manifest.to_json())
        del value["base"]["fingerprint"], value["files"]
        if TASKS[artifact.manifest.task].generates:
            settings = GenerationSettings.read(artifact.directory)
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
    elif (gguf := find_gguf(path)) is not None:
        value = _describe_gguf(gguf)
    else:
        raise ArtifactError(
            f"{path}: holds neither {MANIFEST_FILE} nor {PEFT_CONFIG}, expected an artifact, an "
            "adapter or a GGUF file"
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


def _describe_gguf(file: Path) -> dict[str, Any]:
    from propulsion_export.base_model.gguf.header import read_header
    from propulsion_export.base_model.gguf.merges import merges_in

    header = read_header(file)
    return {
        "kind": "gguf",
        "file": file.name,
        "architecture": header.architecture,
        "name": header.metadata.get("general.name"),
        "parameters": sum(math.prod(place.shape) for place in header.tensors.values()),
        "types": header.types(),
        "bytes": file.stat().st_size,
        "context_length": header.own().get("context_length"),
        "chat_template": "tokenizer.chat_template" in header.metadata,
        "merged": [
            {"adapter": each.adapter, "digest": each.digest, "base": each.base}
            for each in merges_in(header)
        ],
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
