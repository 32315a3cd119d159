"""What an artifact with an adapter folded into its graphs has beside them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.settings import check_settings
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.file_names import GENAI_CONFIG_FILE
from propulsion_export.artifacts.manifest import AdapterEntry
from propulsion_export.base_model.config import read_config, read_settings
from propulsion_export.base_model.settings import (
    SINGLE_LABEL,
    Settings,
    read_tokenizer_settings,
)
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.packaging.copying import copy_artifact_files
from propulsion_export.pipeline.text_files import TextFiles

_PROBLEM_TYPE = "problem_type"


@dataclass(frozen=True)
class FoldedFiles:
    """The configuration and the files that read texts, from those of the artifact folded into.

    Attributes:
        artifact: the artifact folded into.
        adapter: what is folded in.
        entry: of the adapter in the manifest.
        labels: the names of the classes, or how many there are; None without a head that has any.
        untied: whether a weight was copied that modules of the base model share.
    """

    artifact: Artifact
    adapter: Adapter
    entry: AdapterEntry
    labels: tuple[str, ...] | int | None
    untied: bool = False

    def write(self, directory: Path, *, trust_remote_code: bool) -> None:
        """Write them into a directory.

        Raises:
            AdapterError: the adapter was trained with other settings or another tokenizer.
        """
        source, manifest = self.artifact.directory, self.artifact.manifest
        check_settings(
            self.adapter, read_settings(source), read_tokenizer_settings(source), str(source)
        )
        texts = TextFiles.find(
            str(source),
            manifest.task,
            {self.adapter.name: self.entry.source},
            trust_remote_code=trust_remote_code,
        )
        settings = Settings({}, dict(self.adapter.tokenizer_settings))
        self._write_config(directory)
        if self.untied:
            self._untie(directory, trust_remote_code=trust_remote_code)
        texts.write(directory, settings)
        texts.record(directory, settings)
        copy_artifact_files(self.artifact, manifest.files.keys() & {GENAI_CONFIG_FILE}, directory)

    def _write_config(self, directory: Path) -> None:
        """Write config.json: as the artifact's, with the adapter's labels and settings."""
        content = read_settings(self.artifact.directory)
        ordered = list(content) == sorted(content)
        own = dict(self.adapter.model_settings)
        own.pop(_PROBLEM_TYPE, None)
        content |= own
        task = TASKS[self.artifact.manifest.task]
        if task.labelled_output is not None and self.labels:
            names = _names(self.labels)
            content["id2label"] = {str(number): name for number, name in enumerate(names)}
            content["label2id"] = {name: names.index(name) for name in sorted(names)}
            if task.prediction == "class":
                self._set_problem_type(content, len(names))
        if ordered:
            content = dict(sorted(content.items()))
        _write_json(directory / "config.json", content)

    def _untie(self, directory: Path, *, trust_remote_code: bool) -> None:
        """Say in config.json that weights are not tied, where its class does not always tie."""
        from propulsion_export.scaling.fold.ties import always_ties

        config = read_config(str(directory), trust_remote_code=trust_remote_code)
        if not always_ties(config):
            content = read_settings(directory) | {"tie_word_embeddings": False}
            _write_json(directory / "config.json", content)

    def _set_problem_type(self, content: dict[str, Any], labels: int) -> None:
        """Say what the logits mean; transformers refuses to read single labels of one class."""
        kind = self.entry.problem_type
        content.pop(_PROBLEM_TYPE, None)
        if kind is not None and not (labels == 1 and kind == SINGLE_LABEL):
            content[_PROBLEM_TYPE] = kind


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _names(labels: tuple[str, ...] | int) -> tuple[str, ...]:
    if isinstance(labels, int):
        return tuple(f"LABEL_{number}" for number in range(labels))
    return labels
