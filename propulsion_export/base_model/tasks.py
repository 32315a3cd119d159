"""The one table of tasks: everything that depends on a task, except the code that does it.

Adding a task is one entry of `TASKS` and one test.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NewType

from propulsion_export.errors import UsageError

TaskName = NewType("TaskName", str)
Architecture = Literal["encoder", "decoder", "encoder-decoder"]
Prediction = Literal["class", "word classes", "span", "filled masks", "embedding", "text"]


@dataclass(frozen=True)
class Output:
    """One output that models of a task have.

    Attributes:
        name: of the output.
        dimensions: how many it has in every architecture; None where architectures differ.
        counts_tokens: whether the second dimension counts the tokens of the text.
        counts_labels: whether the last dimension counts labels.
    """

    name: str
    dimensions: int | None = None
    counts_tokens: bool = False
    counts_labels: bool = False


@dataclass(frozen=True)
class Training:
    """How an adapter is trained for a task.

    Attributes:
        text: column of the inputs, unless the options name another.
        label: column of the labels or responses.
        measure: reported for each epoch beside the loss.
        best_by: the Trainer's metric for early stopping and the best epoch.
        max_length: default length of a text, in tokens.
    """

    text: str
    label: str
    measure: Literal["accuracy", "perplexity"]
    best_by: Literal["accuracy", "mean_loss"]
    max_length: int


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: as in `--task` and the manifest.
        auto_class: transformers' auto class that loads its models.
        class_endings: endings of the model classes that a checkpoint's `architectures` may name.
        peft_type: PEFT's name for the task; None if PEFT has none.
        architecture: what is exported: one graph, one graph with a cache, or three graphs.
        prediction: what `run` makes of the outputs.
        outputs: that every model of the task has.
        training: how adapters are trained for it; None if they are not.
        peft_heads: modules that PEFT trains with an adapter by default.
    """

    name: TaskName
    auto_class: str
    class_endings: tuple[str, ...]
    peft_type: str | None
    architecture: Architecture
    prediction: Prediction
    outputs: tuple[Output, ...]
    training: Training | None = None
    peft_heads: tuple[str, ...] = ()

    @property
    def generates(self) -> bool:
        """Whether it generates text, with the base model's own lm_head."""
        return self.prediction == "text"

    @property
    def labelled_output(self) -> str | None:
        """The output whose last dimension counts labels, or None."""
        return next((output.name for output in self.outputs if output.counts_labels), None)

    @property
    def token_outputs(self) -> tuple[str, ...]:
        """The outputs whose second dimension counts the tokens of the text."""
        return tuple(output.name for output in self.outputs if output.counts_tokens)

    @property
    def needs_offsets(self) -> bool:
        """Whether predictions are spans of the text, which only a fast tokenizer can locate."""
        return self.prediction in ("word classes", "span")


_CLASSES = Training("text", "label", "accuracy", "accuracy", 128)
_WORD_CLASSES = Training("tokens", "labels", "accuracy", "accuracy", 128)
_RESPONSES = Training("prompt", "response", "perplexity", "mean_loss", 512)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name=TaskName("feature-extraction"),
            auto_class="AutoModel",
            class_endings=(),
            peft_type="FEATURE_EXTRACTION",
            architecture="encoder",
            prediction="embedding",
            outputs=(Output("last_hidden_state", counts_tokens=True),),
        ),
        Task(
            name=TaskName("text-classification"),
            auto_class="AutoModelForSequenceClassification",
            class_endings=("ForSequenceClassification",),
            peft_type="SEQ_CLS",
            architecture="encoder",
            prediction="class",
            outputs=(Output("logits", 2, counts_labels=True),),
            training=_CLASSES,
        ),
        Task(
            name=TaskName("token-classification"),
            auto_class="AutoModelForTokenClassification",
            class_endings=("ForTokenClassification",),
            peft_type="TOKEN_CLS",
            architecture="encoder",
            prediction="word classes",
            outputs=(Output("logits", 3, counts_tokens=True, counts_labels=True),),
            training=_WORD_CLASSES,
            peft_heads=("classifier", "score"),
        ),
        Task(
            name=TaskName("question-answering"),
            auto_class="AutoModelForQuestionAnswering",
            class_endings=("ForQuestionAnswering",),
            peft_type="QUESTION_ANS",
            architecture="encoder",
            prediction="span",
            outputs=(
                Output("start_logits", 2, counts_tokens=True),
                Output("end_logits", 2, counts_tokens=True),
            ),
            peft_heads=("qa_outputs",),
        ),
        Task(
            name=TaskName("fill-mask"),
            auto_class="AutoModelForMaskedLM",
            class_endings=("ForMaskedLM",),
            peft_type=None,
            architecture="encoder",
            prediction="filled masks",
            outputs=(Output("logits", 3, counts_tokens=True),),
        ),
        Task(
            name=TaskName("text-generation"),
            auto_class="AutoModelForCausalLM",
            class_endings=("ForCausalLM", "LMHeadModel"),
            peft_type="CAUSAL_LM",
            architecture="decoder",
            prediction="text",
            outputs=(Output("logits", 3),),
            training=_RESPONSES,
        ),
        Task(
            name=TaskName("text2text-generation"),
            auto_class="AutoModelForSeq2SeqLM",
            class_endings=("ForConditionalGeneration",),
            peft_type="SEQ_2_SEQ_LM",
            architecture="encoder-decoder",
            prediction="text",
            outputs=(),
            training=_RESPONSES,
        ),
    )
}
TRAINED_TASKS = tuple(name for name, task in TASKS.items() if task.training)


def task_of_peft(peft_type: str) -> TaskName | None:
    """The task that PEFT calls `peft_type`, or None."""
    return next((task.name for task in TASKS.values() if task.peft_type == peft_type), None)


def resolve_task(
    task: str, architectures: Sequence[str], adapters_for: Collection[str] = ()
) -> TaskName:
    """Turn `auto` into a task: the adapters' own, else that of the checkpoint's architecture.

    Args:
        task: a name, or `auto`.
        architectures: model classes that the base model's configuration names.
        adapters_for: the tasks that the adapters name.

    Raises:
        UsageError: the adapters are for different tasks, or the task is not one of `TASKS`.
    """
    if task == "auto":
        if len(set(adapters_for)) > 1:
            raise UsageError(
                f"the adapters are for the tasks {', '.join(sorted(set(adapters_for)))}, expected "
                "one",
                remedy="Say which with --task.",
            )
        task = next(iter(adapters_for), None) or _task_of_architecture(architectures)
    if task not in TASKS:
        raise UsageError(
            f"task {task!r} is not supported, expected one of auto, {', '.join(TASKS)}"
        )
    return TASKS[task].name


def _task_of_architecture(architectures: Sequence[str]) -> TaskName:
    for architecture in architectures:
        for task in TASKS.values():
            if architecture.endswith(task.class_endings):
                return task.name
    return TaskName("feature-extraction")
