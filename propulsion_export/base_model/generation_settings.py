"""How a model is meant to generate: the settings in its generation_config.json.

A checkpoint without that file has them in its config.json, as transformers once wrote them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from propulsion_export.base_model.config import read_settings_file
from propulsion_export.errors import ArtifactError

GENERATION_CONFIG = "generation_config.json"
# Settings that change which token comes next and are applied, see `serving.token_rules`; with each,
# the value that leaves everything as it is.
APPLIED: Mapping[str, Any] = {
    "sequence_bias": None,
    "encoder_repetition_penalty": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
# Settings of sampling: the caller says whether to sample, and how.
_SAMPLING: Mapping[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
# Settings of other searches than token by token, or that need more than the model's logits. All
# that are in neither table change nothing (caches, outputs), or only the length, which the caller
# chooses.
_OTHERS: Mapping[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": 0.0,
    "dola_layers": None,
    "guidance_scale": 1.0,
    "watermarking_config": None,
    "stop_strings": None,
    "token_healing": False,
    "forced_decoder_ids": None,
    "assistant_ensemble_weight": None,
}


@dataclass(frozen=True)
class GenerationSettings:
    """The generation settings of a checkpoint or an artifact.

    Attributes:
        file: the file that they are from.
        values: its content.
    """

    file: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, directory: Path) -> "GenerationSettings":
        """Read generation_config.json, or config.json where there is none.

        Raises:
            ArtifactError: the file is no JSON object.
        """
        files = (directory / GENERATION_CONFIG, directory / "config.json")
        file = next((file for file in files if file.is_file()), files[0])
        return cls(file, read_settings_file(file))

    def applied(self) -> dict[str, Any]:
        """The settings with an effect that `serving.token_rules` applies."""
        return self._effective(APPLIED)

    def not_applied(self, *, sampling: bool = False) -> dict[str, Any]:
        """The settings with an effect that are not applied.

        Args:
            sampling: whether the caller chooses how to sample, so that nothing is to say about the
                file's own choice.
        """
        others = self._effective(_OTHERS)
        if self.values.get("do_sample") is not True or sampling:
            return others
        return others | self._effective(_SAMPLING)

    def number(self, name: str, *, least: float = 0) -> float | None:
        """A setting that is a number, None where it has no effect.

        Raises:
            ArtifactError: it is none, or below `least`.
        """
        value = self._effective(APPLIED).get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
            raise self.wrong(name, f"a number of at least {least:g}")
        return value

    def tokens(self, name: str) -> tuple[int, ...]:
        """A setting that is a token's number or a list of them; empty where it is not set.

        Raises:
            ArtifactError: it is neither.
        """
        value = self._effective(APPLIED).get(name)
        numbers = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(number) is not int for number in numbers):
            raise self.wrong(name, "a token's number or a list of them")
        return tuple(number for number in numbers if number >= 0)

    def wrong(self, name: str, expected: str) -> ArtifactError:
        """The error for a setting that cannot be used."""
        return ArtifactError(
            f"{self.file}: {name} is {self.values.get(name)!r}, expected {expected}",
            remedy="Correct the base model's file and export again.",
        )

    def _effective(self, table: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: self.values[name]
            for name, idle in table.items()
            if self.values.get(name) is not None and self.values[name] != idle
        }


def first_decoder_token(directory: Path) -> int:
    """The token that the decoder of an encoder-decoder begins with.

    Raises:
        ArtifactError: the model's files name none, or no number.
    """
    places = (
        (GENERATION_CONFIG, "decoder_start_token_id"),
        ("config.json", "decoder_start_token_id"),
        (GENERATION_CONFIG, "bos_token_id"),
    )
    found = (read_settings_file(directory / file).get(name) for file, name in places)
    token: Any = next((token for token in found if token is not None), None)
    if isinstance(token, list) and len(set(token)) == 1:
        token = token[0]
    if type(token) is not int:
        raise ArtifactError(
            f"{directory / 'config.json'}: decoder_start_token_id is {token!r}, expected a token "
            "number"
        )
    return token
