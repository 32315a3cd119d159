"""Training runs for text generation and text-to-text generation."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import transformers

from propulsion_export.environment.paths import user_path
from propulsion_export.errors import DataError
from propulsion_export.training.data import hold_out
from propulsion_export.training.encode import Rows
from propulsion_export.training.losses import (
    mean_cross_entropy,
    mean_next_token_loss,
    next_token_losses,
    token_losses,
)
from propulsion_export.training.metrics import perplexity_of, token_scores
from propulsion_export.training.options import TrainOptions
from propulsion_export.training.packing import BlockCollator, block_of, pack_rows
from propulsion_export.training.passages import Passage, check_same_form, read_passages
from propulsion_export.training.run import Data, Objective, TrainingRun
from propulsion_export.training.sequences import Sequences, encode_pairs, encode_passages


class _GeneratorRun(TrainingRun[Passage]):
    """Trains no head; the comparison is the base model's loss on the validation data."""

    base_loss: float

    @staticmethod
    def read(source: Path, options: TrainOptions) -> Data[Passage]:
        passages = read_passages(source, options.columns)
        if options.validation is None:
            training, validation = hold_out(source, passages, options.seed, stratum=lambda _: "")
            origin = f"a tenth of the rows of {source.name}, held out with seed {options.seed}"
            return Data(training, validation, origin)
        file = user_path(options.validation)
        validation = read_passages(file, options.columns)
        check_same_form(file, validation, passages)
        return Data(passages, validation, file.name)

    def after_training(self) -> None:
        # Not before training: accelerate does not wrap a model for DDP after the Trainer has used
        # it, and each process would train on its own share (transformers 5.24, accelerate 1.15).
        with self.model.disable_adapter():
            measured = self.trainer.predict(self.trainer.eval_dataset, metric_key_prefix="base")
        self.base_loss = measured.metrics["base_mean_loss"]

    def described(self) -> dict[str, Any]:
        return {
            "base_loss": self.base_loss,
            "base_perplexity": perplexity_of(self.base_loss),
            "tokens": self.learnt,
        }

    def encoded(self) -> Rows:
        training = self._checked(self.sequences(self.data.training), "training")
        validation = self._checked(self.sequences(self.data.validation), "validation")
        self.learnt = {"train": training.learnt, "validation": validation.learnt}
        return self.collated(training, validation)

    @abstractmethod
    def sequences(self, passages: list[Passage]) -> Sequences:
        """Encode some passages."""

    def collated(self, training: Sequences, validation: Sequences) -> Rows:
        """The rows with a collator that pads them to the longest of a batch."""
        # The collator needs the model: an encoder-decoder builds decoder inputs from the labels.
        collate = transformers.DataCollatorForSeq2Seq(self.base.tokenizer, self.base.model)
        return Rows(training.rows, validation.rows, collate)

    def _checked(self, encoded: Sequences, part: str) -> Sequences:
        """Note how many passages were cut or left out; refuse if no row remains."""
        total = f"{encoded.passages} {part} rows"
        if not encoded.rows:
            raise DataError(
                f"{total}: every prompt fills the {self.longest} tokens that a row may have, "
                "expected room for a response",
                remedy="Raise --max-length, or shorten the prompts.",
            )
        if encoded.left_out:
            self.notes.append(
                f"{encoded.left_out} of {total} are left out: their prompt leaves nothing to learn "
                f"in {self.longest} tokens."
            )
        if encoded.cut:
            self.notes.append(f"{encoded.cut} of {total} are cut to {self.longest} tokens.")
        return encoded


class DecoderRun(_GeneratorRun):
    """Trains a decoder, on rows that hold prompt and response."""

    objective = Objective(mean_next_token_loss, next_token_losses, token_scores)

    def sequences(self, passages: list[Passage]) -> Sequences:
        split = self.options.packing and passages is self.data.training
        return encode_passages(passages, self.base.tokenizer, self.longest, split=split)

    def collated(self, training: Sequences, validation: Sequences) -> Rows:
        if not self.options.packing:
            return super().collated(training, validation)
        blocks = pack_rows(training.rows, self.longest)
        filled = sum(len(block["input_ids"]) for block in blocks) / (len(blocks) * self.longest)
        self.notes.append(
            f"{len(training.rows)} training rows are in {len(blocks)} blocks of {self.longest} "
            f"tokens, {filled:.0%} full; a batch counts blocks."
        )
        # One validation row per block: the loss of a row is the same, packed or not.
        alone = [block_of([row]) for row in validation.rows]
        return Rows(blocks, alone, BlockCollator(self.base.tokenizer.pad_token_id))


class EncoderDecoderRun(_GeneratorRun):
    """Trains an encoder-decoder, with prompts as inputs and responses as labels."""

    objective = Objective(mean_cross_entropy, token_losses, token_scores)

    def sequences(self, passages: list[Passage]) -> Sequences:
        return encode_pairs(passages, self.base.tokenizer, self.longest)
