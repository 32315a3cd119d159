"""The tasks that an adapter can be trained for, and what each is called elsewhere."""

from dataclasses import dataclass
from typing import Literal

Task = Literal[
    "text-classification", "token-classification", "text-generation", "text2text-generation"
]


@dataclass(frozen=True)
class Kind:
    """What sets a task apart wherever it is only a name.

    Attributes:
        text: column of the inputs, unless the options name another.
        label: column of what is to be learnt of them.
        auto_class: transformers' loader of its models.
        peft_type: PEFT's name for it.
        measure: what an epoch is judged by for a reader, beside its loss.
        best_by: the Trainer's name of what early stopping and the best epoch go by.
        max_length: tokens that a text may have, unless the options say.
    """

    text: str
    label: str
    auto_class: str
    peft_type: str
    measure: Literal["accuracy", "perplexity"]
    best_by: Literal["accuracy", "mean_loss"]
    max_length: int

    @property
    def generates(self) -> bool:
        """Whether it learns to write text, without a head of its own."""
        return self.measure == "perplexity"


KINDS: dict[Task, Kind] = {
    "text-classification": Kind(
        text="text",
        label="label",
        auto_class="AutoModelForSequenceClassification",
        peft_type="SEQ_CLS",
        measure="accuracy",
        best_by="accuracy",
        max_length=128,
    ),
    "token-classification": Kind(
        text="tokens",
        label="labels",
        auto_class="AutoModelForTokenClassification",
        peft_type="TOKEN_CLS",
        measure="accuracy",
        best_by="accuracy",
        max_length=128,
    ),
    "text-generation": Kind(
        text="prompt",
        label="response",
        auto_class="AutoModelForCausalLM",
        peft_type="CAUSAL_LM",
        measure="perplexity",
        best_by="mean_loss",
        max_length=512,
    ),
    "text2text-generation": Kind(
        text="prompt",
        label="response",
        auto_class="AutoModelForSeq2SeqLM",
        peft_type="SEQ_2_SEQ_LM",
        measure="perplexity",
        best_by="mean_loss",
        max_length=512,
    ),
}
