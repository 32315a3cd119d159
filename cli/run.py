"""`propulsion-export run`: predict with an artifact, generate text, or chat."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from propulsion_export.errors import UsageError

from .chat import is_terminal, talk
from .console import Console, console_options
from .options import DIRECTORY, FILE, runner_option, trust_option
from .streams import print_result

_SHOWN = 4  # numbers of an embedding that are printed


@click.command(
    epilog='\b\nExample: propulsion-export run onnx/switchable --adapter topic --text "a large cat"'
)
@click.argument("artifact", metavar="DIR", type=DIRECTORY)
@click.option("--text", multiple=True, help="A text, a question or a prompt; repeatable.")
@click.option(
    "--inputs",
    type=FILE,
    help="File of texts: one per line, or JSONL, CSV or Parquet with a column `text`.",
)
@click.option(
    "--chat",
    is_flag=True,
    help="Each text is a user's turn for the chat template; "
    "without texts, a conversation on the terminal.",
)
@click.option("--system", metavar="TEXT", help="System turn of a conversation.")
@click.option(
    "--conversation",
    type=FILE,
    help="File of conversations to go on with: JSON messages, or rows with a column `messages`.",
)
@click.option(
    "--context",
    multiple=True,
    help="Text that a question is about, or the second text of a pair: one for all, or one each.",
)
@click.option(
    "--adapter",
    multiple=True,
    metavar="NAME",
    help="Adapter to use: one for all texts, or one for each.  [default: the only one, else base]",
)
@click.option("--max-new-tokens", type=int, help="Most tokens to generate.  [default: 128]")
@click.option(
    "--temperature",
    type=float,
    help="Sample tokens; below 1 prefers likely ones.  [default: always the likeliest token]",
)
@click.option("--top-k", type=int, help="Sample from this many of the likeliest tokens.")
@click.option(
    "--top-p",
    type=float,
    help="Sample from the likeliest tokens that together have this probability.",
)
@click.option("--seed", type=int, help="Seed for sampling.  [default: a different text every time]")
@runner_option
@trust_option
@console_options
def command(
    console: Console,
    *,
    artifact: Path,
    text: tuple[str, ...],
    inputs: Path | None,
    chat: bool,
    system: str | None,
    conversation: Path | None,
    context: tuple[str, ...],
    adapter: tuple[str, ...],
    max_new_tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    runner: str,
    trust_remote_code: bool,
) -> None:
    """Predict with an artifact, generate text, or chat.

    The text generated for a single prompt is printed as it is generated.
    """
    from propulsion_export.pipeline.run import predict

    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    if chat and not (text or inputs or conversation) and is_terminal():
        loading = {"runner": runner, "trust_remote_code": trust_remote_code}
        _talk(console, artifact, adapter, system, {"options": options, **loading})
        return
    alone = len(text) == 1 and inputs is None
    on_text = _print_piece if alone and not (console.json or console.quiet) else None
    predictions = predict(
        artifact,
        text=text,
        inputs=inputs,
        context=context,
        adapter=adapter,
        runner=runner,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        trust_remote_code=trust_remote_code,
        chat=chat,
        system=system,
        conversation=conversation,
        on_text=on_text,
        on_note=console.note,
    )
    console.result({"predictions": predictions}, _text(predictions, streamed=alone))
    for note in dict.fromkeys(item["note"] for item in predictions if "note" in item):
        console.note(note)
    for number in _out_of_positions(predictions, max_new_tokens):
        console.note(f"text {number}: stopped, the model has no more positions")


def _talk(
    console: Console,
    artifact: Path,
    adapters: Sequence[str],
    system: str | None,
    settings: Mapping[str, Any],
) -> None:
    """A conversation on the terminal, with one adapter."""
    from propulsion_export.pipeline.run import open_chat

    if console.json or len(adapters) > 1:
        found = "--json" if console.json else f"{len(adapters)} adapters"
        raise UsageError(
            f"{found}: is not for a conversation on the terminal",
            remedy="Give the turns with --text or --conversation.",
        )
    chosen = adapters[0] if adapters else None
    talk(open_chat(artifact, adapter=chosen, system=system, on_note=console.note, **settings))


def shown(prediction: Mapping[str, Any]) -> str:
    """A prediction as text for people, on one line."""
    if "generated" in prediction:
        return "\\n".join(prediction["generated"].splitlines())
    if "problem_type" in prediction:
        return _scores(prediction)
    if "label" in prediction:
        return f"{prediction['label']} ({prediction['score']:.1%})"
    if "tokens" in prediction:
        return " ".join(f"{token['word']}/{token['label']}" for token in prediction["tokens"])
    if "answer" in prediction:
        where = f"characters {prediction['start']} to {prediction['end']}"
        return f"{prediction['answer']} ({prediction['score']:.1%}, {where})"
    if "filled" in prediction:
        return ", ".join(prediction["filled"])
    numbers = prediction["embedding"]
    first = " ".join(f"{number:g}" for number in numbers[:_SHOWN])
    return f"{first} ... ({len(numbers)} numbers, {prediction['pooling']}, --json has them all)"


def _scores(prediction: Mapping[str, Any]) -> str:
    """The outputs of a regression, or the labels of a text that may have several."""
    scores = {one["label"]: one["score"] for one in prediction.get("scores", ())}
    if prediction["problem_type"] == "regression":
        several = " ".join(f"{label}={score:g}" for label, score in scores.items())
        return several or f"{prediction['score']:g}"
    found = ", ".join(f"{label} ({scores[label]:.1%})" for label in prediction["labels"])
    return found or f"no label (likeliest: {prediction['label']}, {prediction['score']:.1%})"


def _text(predictions: Sequence[Mapping[str, Any]], *, streamed: bool) -> str:
    if "generated" not in predictions[0]:
        return "\n".join(f"{p['text']}\t{p['adapter']}\t{shown(p)}" for p in predictions)
    if streamed:
        return ""  # the text is printed already; this ends its line
    return "\n".join(
        f"{number}\t{item['adapter']}\t{shown(item)}" for number, item in enumerate(predictions, 1)
    )


def _out_of_positions(
    predictions: Sequence[Mapping[str, Any]], max_new_tokens: int | None
) -> Iterator[int]:
    """Numbers, from 1, of the texts that stopped before the most tokens they may have."""
    from propulsion_export.serving.generation import DEFAULT_NEW_TOKENS

    most = max_new_tokens or DEFAULT_NEW_TOKENS
    for number, item in enumerate(predictions, 1):
        if item.get("stopped") == "length" and len(item["tokens"]) < most:
            yield number


def _print_piece(number: int, piece: str) -> None:
    print_result(piece, nl=False)
