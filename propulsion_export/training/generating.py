"""Training runs that learn to write texts, or responses to prompts."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import transformers

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
from propulsion_export.training.packing import BlockCollator, block_of, pack
from propulsion_export.training.passages import Passage, check_same_form, read_passages
from propulsion_export.training.run import Data, Objective, TrainingRun
from propulsion_export.training.sequences import Sequences, encode_pairs, encode_passages


class _GeneratorRun(TrainingRun[Passage]):
    """Trains no head; compares with the base model's own loss on the validation data."""

    base_loss: float

    @staticmethod
    def read(source: Path, options: TrainOptions) -> Data[Passage]:
        passages = read_passages(source, options.columns)
        if options.validation is None:
            training, validation = hold_out(source, passages, options.seed, stratum=lambda _: "")
            origin = f"a tenth of the rows of {source.name}, held out with seed {options.seed}"
            return Data(training, validation, origin)
        file = Path(options.validation).expanduser()
        validation = read_passages(file, options.columns)
        check_same_form(file, validation, passages)
        return Data(passages, validation, file.name)

    def after_training(self) -> None:
        # Not before: what the Trainer has measured once, accelerate does not wrap for DDP anew, and
        # each process would train on its own share alone (transformers 5.24, accelerate 1.15).
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
        """The token ids of some passages."""

    def collated(self, training: Sequences, validation: Sequences) -> Rows:
        """Rows that are padded to the longest of a batch."""
        # An encoder-decoder makes its decoder's inputs of the labels.
        collate = transformers.DataCollatorForSeq2Seq(self.base.tokenizer, self.base.model)
        return Rows(training.rows, validation.rows, collate)

    def _checked(self, made: Sequences, part: str) -> Sequences:
        """Tell what does not fit, and refuse when nothing does."""
        total = f"{made.passages} {part} rows"
        if not made.rows:
            raise DataError(
                f"{total}: every prompt fills the {self.longest} tokens that a row may have, "
                "expected room for a response",
                remedy="Raise --max-length, or shorten the prompts.",
            )
        if made.left_out:
            self.notes.append(
                f"{made.left_out} of {total} are left out: their prompt leaves nothing to learn in "
                f"{self.longest} tokens."
            )
        if made.cut:
            self.notes.append(f"{made.cut} of {total} are cut to {self.longest} tokens.")
        return made


class DecoderRun(_GeneratorRun):
    """A decoder, which reads and writes one row."""

    objective = Objective(mean_next_token_loss, next_token_losses, token_scores)

    def sequences(self, passages: list[Passage]) -> Sequences:
        split = self.options.packing and passages is self.data.training
        return encode_passages(passages, self.base.tokenizer, self.longest, split=split)

    def collated(self, training: Sequences, validation: Sequences) -> Rows:
        if not self.options.packing:
            return super().collated(training, validation)
        blocks = pack(training.rows, self.longest)
        filled = sum(len(block["input_ids"]) for block in blocks) / (len(blocks) * self.longest)
        self.notes.append(
            f"{len(training.rows)} training rows are in {len(blocks)} blocks of {self.longest} "
            f"tokens, {filled:.0%} full; a batch counts blocks."
        )
        # One row a block: its loss is the same, packed or not.
        alone = [block_of([row]) for row in validation.rows]
        return Rows(blocks, alone, BlockCollator(self.base.tokenizer.pad_token_id))


class EncoderDecoderRun(_GeneratorRun):
    """An encoder-decoder, which reads prompts and writes responses."""

    objective = Objective(mean_cross_entropy, token_losses, token_scores)

    def sequences(self, passages: list[Passage]) -> Sequences:
        return encode_pairs(passages, self.base.tokenizer, self.longest)
