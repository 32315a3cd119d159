"""Training runs for text generation and text-to-text generation."""

import math
from abc import abstractmethod
from pathlib import Path
from typing import Any

import transformers

from propulsion_export.base_model.chat.templates import write_template
from propulsion_export.data.messages import Conversation
from propulsion_export.environment.paths import user_path
from propulsion_export.errors import BaseModelError, DataError, UsageError
from propulsion_export.training.conversations import ChatEncoder
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
from propulsion_export.training.passages import Learnt, Passage, check_same_form, read_passages
from propulsion_export.training.run import Data, Objective, TrainingRun
from propulsion_export.training.sequences import Sequences, encode_pairs, encode_passages


class _GeneratorRun(TrainingRun[Learnt]):
    """Trains no head; the comparison is the base model's loss on the validation data."""

    base_loss: float
    conversations: ChatEncoder | None = None  # where the rows are conversations

    @staticmethod
    def read(source: Path, options: TrainOptions) -> Data[Learnt]:
        passages: list[Learnt] = [*read_passages(source, options.columns)]
        _check_template_option(passages, options)
        if options.validation is None:
            training, validation = hold_out(source, passages, options.seed, stratum=lambda _: "")
            origin = f"a tenth of the rows of {source.name}, held out with seed {options.seed}"
            return Data(training, validation, origin)
        file = user_path(options.validation)
        validation = [*read_passages(file, options.columns)]
        check_same_form(file, validation, passages)
        return Data(passages, validation, file.name)

    def after_training(self) -> None:
        # Not before training: accelerate does not wrap a model for DDP after the Trainer has used
        # it, and each process would train on its own share (transformers 5.24, accelerate 1.15).
        with self.model.disable_adapter():
            measured = self.trainer.predict(self.trainer.eval_dataset, metric_key_prefix="base")
        self.base_loss = measured.metrics["base_mean_loss"]
        if not math.isfinite(self.base_loss):
            raise BaseModelError(
                f"{self.base.name}: its loss on the validation data is {self.base_loss}, expected "
                "a finite number to compare with"
            )

    def described(self) -> dict[str, Any]:
        return {
            "base_loss": self.base_loss,
            "base_perplexity": perplexity_of(self.base_loss),
            "tokens": self.learnt,
        }

    def encoded(self) -> Rows:
        if isinstance(self.data.training[0], Conversation):
            settings = getattr(self.base.model, "generation_config", None)
            self.conversations = ChatEncoder.open(self.base.name, self.base.tokenizer, settings)
        training = self._checked(self.sequences(self.data.training), "training")
        validation = self._checked(self.sequences(self.data.validation), "validation")
        self.learnt = {"train": training.learnt, "validation": validation.learnt}
        return self.collated(training, validation)

    @abstractmethod
    def sequences(self, passages: list[Learnt]) -> Sequences:
        """Encode some passages."""

    def write_beside(self, directory: Path) -> None:
        # A request is to be rendered with the template that the adapter was trained with.
        if self.conversations is not None:
            write_template(directory, self.conversations.chat.template)

    def collated(self, training: Sequences, validation: Sequences) -> Rows:
        """The rows with a collator that pads them to the longest of a batch."""
        # The collator needs the model: an encoder-decoder builds decoder inputs from the labels.
        collate = transformers.DataCollatorForSeq2Seq(self.base.tokenizer, self.base.model)
        return Rows(training.rows, validation.rows, collate)

    def _checked(self, encoded: Sequences, part: str) -> Sequences:
        """Note how many passages were cut or left out; refuse if no row remains."""
        total = f"{encoded.passages} {part} rows"
        if not encoded.rows:
            before = "prompt" if self.conversations is None else "conversation before an answer"
            raise DataError(
                f"{total}: every {before} fills the {self.longest} tokens that a row may have, "
                "expected room for a response",
                remedy="Raise --max-length, or shorten the prompts.",
            )
        if encoded.left_out:
            before = "their prompt" if self.conversations is None else "what is before the answers"
            self.notes.append(
                f"{encoded.left_out} of {total} are left out: {before} leaves nothing to learn "
                f"in {self.longest} tokens."
            )
        if encoded.cut:
            self.notes.append(f"{encoded.cut} of {total} are cut to {self.longest} tokens.")
        return encoded


class DecoderRun(_GeneratorRun):
    """Trains a decoder, on rows that hold prompt and response."""

    objective = Objective(mean_next_token_loss, next_token_losses, token_scores)

    def sequences(self, passages: list[Learnt]) -> Sequences:
        if self.conversations is not None:
            chats = [one for one in passages if isinstance(one, Conversation)]
            return self.conversations.encode(chats, self.longest)
        split = self.options.packing and passages is self.data.training
        return encode_passages(_plain(passages), self.base.tokenizer, self.longest, split=split)

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

    def sequences(self, passages: list[Learnt]) -> Sequences:
        return encode_pairs(_plain(passages), self.base.tokenizer, self.longest)


def _plain(passages: list[Learnt]) -> list[Passage]:
    return [one for one in passages if isinstance(one, Passage)]


def _check_template_option(passages: list[Learnt], options: TrainOptions) -> None:
    if options.chat_template is not None and not isinstance(passages[0], Conversation):
        raise UsageError(
            "--chat-template: is for conversations, the data have no column of messages",
            remedy="Leave it out.",
        )
