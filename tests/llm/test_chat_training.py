"""Conversations are learnt: the assistant's turns and nothing else, from file to adapter."""

import json
import random
import shutil
from dataclasses import replace

import peft
import pytest
import torch
import transformers

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.base_model.chat.templates import read_template
from propulsion_export.cli import main
from propulsion_export.errors import DataError, UsageError
from propulsion_export.training import train

ANSWERS = {"a": "yes", "b": "no", "c": "hm"}


def chat_rows(count, seed):
    """Two turns; each answer follows from the turn before, the user says anything."""
    chooser = random.Random(seed)
    rows = []
    for _ in range(count):
        asked = [f"{chooser.choice('xyz')}{chooser.choice('abc')}" for _ in range(2)]
        said = [ANSWERS[text[1]] for text in asked]
        turns = [turn for pair in zip(asked, said, strict=True) for turn in pair]
        roles = ("user", "assistant") * 2
        rows.append(
            {
                "messages": [
                    {"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)
                ]
            }
        )
    return rows


def chatml_pieces(row):
    """The text of a row in pieces, each with whether it is learnt, written by hand."""
    for message in row["messages"]:
        yield f"<|im_start|>{message['role']}\n", False
        yield f"{message['content']}<|im_end|>", message["role"] == "assistant"
        yield "\n", False


def mean_loss(model, tokenizer, rows, *, of="assistant"):
    """The loss in float64 over the answers, or over what the user says, and how many tokens."""
    model = model.double().eval()
    total, count = 0.0, 0
    for row in rows:
        ids, learnt = [], []
        for text, is_answer in chatml_pieces(row):
            own = tokenizer(text, add_special_tokens=False)["input_ids"]
            says = text.endswith("<|im_end|>") and is_answer == (of == "assistant")
            ids, learnt = ids + own, learnt + [says] * len(own)
        with torch.no_grad():
            losses = -model(torch.tensor([ids])).logits.log_softmax(-1)[0]
        places = [place for place, is_learnt in enumerate(learnt) if is_learnt]
        total += sum(losses[place - 1, ids[place]].item() for place in places)
        count += len(places)
    return total / count, count


@pytest.fixture(name="held_out")
def make_held_out(write_rows, tmp_path):
    return write_rows(tmp_path / "held-out.jsonl", chat_rows(8, 2))


def load(directory):
    auto, tokenizer = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    return auto.from_pretrained(directory), tokenizer.from_pretrained(directory)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_answers_are_learnt_and_what_the_user_says_is_not(
    packing, chat_base, chat_options, write_rows, held_out, tmp_path
):
    base = chat_base("chatml")
    data = write_rows(tmp_path / "train.jsonl", chat_rows(32, 1))
    options = replace(chat_options, validation=held_out, packing=packing, epochs=8)

    metrics = train(base, data, tmp_path / "out", options=options).metrics

    model, tokenizer = load(base)
    expected, count = mean_loss(model, tokenizer, chat_rows(8, 2))
    before, _ = mean_loss(model, tokenizer, chat_rows(8, 2), of="user")
    assert metrics["tokens"]["validation"] == count
    assert metrics["tokens"]["train"] == mean_loss(model, tokenizer, chat_rows(32, 1))[1]
    assert metrics["base_loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["validation_loss"] < metrics["base_loss"] / 2
    tuned = peft.PeftModel.from_pretrained(load(base)[0], tmp_path / "out")
    after, _ = mean_loss(tuned, tokenizer, chat_rows(8, 2))
    assert after == pytest.approx(metrics["validation_loss"], rel=1e-4)
    user, _ = mean_loss(tuned, tokenizer, chat_rows(8, 2), of="user")
    assert user > before / 2
    # The twin: a mask on the user's turns would not pass.
    assert metrics["base_loss"] != pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("family", ["llama3", "gemma", "qwen3", "mistral", "glm", "last-eos"])
def test_families_are_learnt(family, chat_base, chat_options, write_rows, held_out, tmp_path):
    data = write_rows(tmp_path / "train.jsonl", chat_rows(24, 1))
    options = replace(chat_options, validation=held_out, epochs=4)

    metrics = train(chat_base(family), data, tmp_path / "out", options=options).metrics

    assert metrics["validation_loss"] < 0.8 * metrics["base_loss"]
    assert metrics["notes"] == []
    assert read_template(tmp_path / "out") == read_template(chat_base(family))


def test_the_command_learns_conversations_and_says_the_same(
    chat_base, write_rows, held_out, tmp_path, capsys
):
    data = write_rows(tmp_path / "train.jsonl", chat_rows(8, 1))
    arguments = ["train", "-m", str(chat_base()), "-d", str(data), "-o", str(tmp_path / "out")]
    more = ["--task", "text-generation", "--validation", str(held_out), "--epochs", "1", "--json"]

    with pytest.raises(SystemExit) as done:
        main([*arguments, *more])

    assert done.value.code == 0
    told = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for name in ("base_loss", "tokens"):
        assert told[name] == written[name]
    assert written["tokens"]["train"] > 0
    assert Adapter.read(tmp_path / "out").task == "text-generation"


def test_a_template_given_is_learnt_with_and_saved(
    chat_base, chat_options, write_rows, held_out, tmp_path
):
    template = "{% for m in messages %}{{ m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    file = tmp_path / "own.jinja"
    file.write_text(template)
    options = replace(chat_options, validation=held_out, epochs=1)

    own = train(
        *(chat_base(), held_out, tmp_path / "own"), options=replace(options, chat_template=file)
    )
    usual = train(chat_base(), held_out, tmp_path / "usual", options=options)

    assert read_template(tmp_path / "own") == template
    assert own.metrics["options"]["chat_template"] == str(file)
    assert own.metrics["tokens"] == usual.metrics["tokens"]
    assert own.metrics["base_loss"] != usual.metrics["base_loss"]


def test_a_run_with_another_template_is_not_resumed(chat_base, chat_options, held_out, tmp_path):
    def stop(share, message):
        if "epoch 1" in message:
            raise KeyboardInterrupt

    options = replace(chat_options, validation=held_out)
    with pytest.raises(KeyboardInterrupt):
        train(chat_base(), held_out, tmp_path / "out", options=options, progress=stop)
    other = tmp_path / "other.jinja"
    other.write_text("{# #}" + read_template(chat_base()))
    changed = replace(options, resume=True, chat_template=other)

    with pytest.raises(Exception, match="its weights, settings or tokenizer are not those"):
        train(chat_base(), held_out, tmp_path / "out", options=changed)
    resumed = train(
        *(chat_base(), held_out, tmp_path / "out"), options=replace(options, resume=True)
    )
    whole = train(chat_base(), held_out, tmp_path / "whole", options=options)
    assert resumed.metrics["epochs"] == whole.metrics["epochs"]


def test_rows_that_do_not_fit_are_in_the_notes(
    chat_base, chat_options, write_rows, held_out, tmp_path
):
    rows = chat_rows(4, 1)
    rows[0]["messages"][0]["content"] = "x" * 60
    data = write_rows(tmp_path / "train.jsonl", rows)
    options = replace(chat_options, validation=held_out, epochs=1, max_length=45)

    notes = train(chat_base(), data, tmp_path / "out", options=options).notes

    assert notes[0] == (
        "1 of 4 training rows are left out: what is before the answers leaves nothing to learn in "
        "45 tokens."
    )
    assert notes[1] == "3 of 4 training rows are cut to 45 tokens."
    options = replace(options, max_length=16)
    with pytest.raises(DataError, match="every conversation before an answer fills the 16 tokens"):
        train(chat_base(), data, tmp_path / "none", options=options)
    assert not (tmp_path / "none").exists()


GOOD = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("messages", "finding"),
    [
        ([], "messages is empty"),
        (None, "messages is null, expected a list"),
        ("hi", "messages is 'hi', expected a list"),
        (["hi"], "message 1 is 'hi', expected an object"),
        ([{"role": "human", "content": "a"}], "message 1 has the role 'human', expected one of"),
        ([{"from": "human", "value": "a"}], "message 1 has the role null"),
        ([GOOD[0], {"role": "assistant"}], "message 2 has the content null"),
        ([GOOD[0], {"role": "assistant", "content": 3}], "message 2 has the content 3"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}, GOOD[1]],
            "message 1 has the content {'type': 'image_url'}, expected parts of type text",
        ),
        ([GOOD[0], GOOD[1] | {"weight": 0.5}], "message 2 has the weight 0.5, expected 0 or 1"),
        ([GOOD[0], GOOD[1] | {"weight": 0}], "every message of the assistant has weight 0"),
        (
            [
                GOOD[0],
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
                },
            ],
            "message 2 has the arguments '{', expected a JSON object",
        ),
        ([{"role": "user", "content": "\ud800"}, GOOD[1]], "holds half a character"),
        ([{"role": "user", "content": "\U00100000"}, GOOD[1]], "private-use character U+100000"),
        ([GOOD[0]], "has no message of the assistant"),
        ([{"role": "system", "content": "a"}], "has no message of the assistant"),
    ],
)
def test_bad_rows_are_refused_in_one_line_with_exit_code_4(
    messages, finding, chat_base, write_rows, held_out, tmp_path, capsys
):
    data = write_rows(tmp_path / "bad.jsonl", [{"messages": GOOD}, {"messages": messages}])
    arguments = ["train", "-m", str(chat_base()), "-d", str(data), "-o", str(tmp_path / "out")]

    with pytest.raises(SystemExit) as done:
        main([*arguments, "--task", "text-generation", "--validation", str(held_out)])

    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert done.value.code == 4
    assert f"{data}: line 2: " in last
    assert finding in last
    assert not (tmp_path / "out").exists()


def test_a_base_model_without_a_template_is_refused_with_the_remedy(
    chat_base, write_rows, held_out, tmp_path, capsys
):
    base = tmp_path / "base"
    shutil.copytree(chat_base(), base)
    (base / "chat_template.jinja").unlink()
    arguments = ["train", "-m", str(base), "-d", str(held_out), "-o", str(tmp_path / "out")]

    with pytest.raises(SystemExit) as done:
        main([*arguments, "--task", "text-generation"])

    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert done.value.code == 4
    assert "has no chat template" in last
    assert "--chat-template" in last


def test_options_and_forms_that_do_not_fit_are_refused(
    chat_base, chat_options, write_rows, held_out, tmp_path
):
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "a"}, {"text": "b"}])
    both = write_rows(tmp_path / "both.jsonl", [{"text": "a", "messages": GOOD}])

    templated = replace(chat_options, chat_template=texts)
    validated = replace(chat_options, validation=texts)
    with pytest.raises(UsageError, match="--chat-template: is for conversations"):
        train(chat_base(), texts, tmp_path / "out", options=templated)
    with pytest.raises(UsageError, match="expected none for --task text-classification"):
        replace(templated, task="text-classification")
    with pytest.raises(DataError, match="holds texts, expected conversations"):
        train(chat_base(), held_out, tmp_path / "out", options=validated)
    with pytest.raises(DataError, match="has the columns 'messages' and 'text'"):
        train(chat_base(), both, tmp_path / "out", options=chat_options)


def test_a_column_of_another_name_is_read_and_arrow_files_too(
    chat_base, chat_options, write_rows, held_out, tmp_path
):
    import datasets

    rows = [{"talk": row["messages"], "text": "a"} for row in chat_rows(6, 1)]
    rows[1]["talk"][1]["weight"] = 1  # null in all others
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    options = replace(chat_options, text_column="talk", epochs=1, validation=None)

    metrics = train(
        chat_base(), tmp_path / "train.parquet", tmp_path / "out", options=options
    ).metrics

    assert metrics["rows"] == {"train": 5, "validation": 1}
