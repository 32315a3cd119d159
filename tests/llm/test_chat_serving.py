"""Conversations are answered: by a session, by `run`, and turn by turn on a terminal."""

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from tiny_models import make_random_adapter

from propulsion_export import Session, Settings, add_adapter, export_onnx, merge
from propulsion_export.base_model.chat.templates import read_template, write_template
from propulsion_export.cli import main
from propulsion_export.errors import UsageError
from propulsion_export.pipeline.run import open_chat
from propulsion_export.serving.chat import Chat

MODES = ("folded", "switchable", "bank")
SHORT = Settings(new_tokens=6)
ASK = [{"role": "user", "content": "hi"}]
TALK = [*ASK, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "so"}]
OWN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module", name="adapters")
def make_adapters(chat_base, tmp_path_factory):
    """Two adapters of the base model; `own` was trained with a template of its own."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(chat_base())
    directory = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("plain", "own"), 1):
        made = make_random_adapter(model, seed, name, task="text-generation")
        (directory / name).mkdir()
        made.write(directory / name)
    write_template(directory / "own", OWN)
    return directory


@pytest.fixture(scope="module", name="chats")
def make_chats(chat_base, adapters, tmp_path_factory):
    """The artifact of each mode, with both adapters where it takes several."""
    made = {}

    def make(mode):
        if mode not in made:
            names = ["own"] if mode == "folded" else ["plain", "own"]
            made[mode] = tmp_path_factory.mktemp("chats") / mode
            given = [str(adapters / name) for name in names]
            export_onnx(given, made[mode], model=str(chat_base()), mode=mode)
        return made[mode]

    return make


def prompt_tokens(chat_base, messages, template=None):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_base())
    return tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, return_dict=False
    )


def greedy(session, ids, adapter, count=6):
    """The likeliest tokens after a prompt, computed from the session's logits."""
    ids = list(ids)
    for _ in range(count):
        batch = np.array([ids])
        inputs = {"input_ids": batch, "attention_mask": np.ones_like(batch)}
        [reply] = session(inputs, adapter)
        ids.append(int(reply.outputs["logits"][-1].argmax()))
    return ids[-count:]


@pytest.mark.parametrize("mode", MODES)
def test_session_answers_behind_the_rendered_conversation(mode, chats, chat_base):
    session = Session(chats(mode))
    templates = {"plain": None, "own": OWN}

    for name in session.adapters:
        [reply] = session(TALK, name, settings=SHORT)

        expected = greedy(session, prompt_tokens(chat_base, TALK, templates[name]), name)
        other = greedy(session, prompt_tokens(chat_base, TALK, "{{ messages[0].content }}"), name)
        found = reply.prediction["tokens"]
        assert found == expected[: len(found)]
        assert found
        assert found != other[: len(found)]


@pytest.mark.parametrize("mode", ["switchable", "bank"])
def test_each_row_has_its_adapter_and_its_template(mode, chats, chat_base):
    session = Session(chats(mode))
    names = ["plain", "own", "base", "plain"]

    replies = session([ASK, ASK, TALK, tuple(TALK)], names, settings=SHORT)

    assert [reply.adapter for reply in replies] == names
    alone = [
        session(asked, name, settings=SHORT)[0]
        for asked, name in zip([ASK, ASK, TALK, TALK], names, strict=True)
    ]
    assert [r.prediction for r in replies] == [r.prediction for r in alone]
    assert replies[0].prediction != replies[1].prediction


def test_the_folded_adapters_template_is_the_artifacts(chats, chat_base):
    assert read_template(chats("folded")) == OWN
    assert read_template(chats("switchable")) == read_template(chat_base())
    manifest = json.loads((chats("switchable") / "propulsion.json").read_text())
    assert manifest["adapters"]["own"]["chat_template"] == OWN
    assert manifest["adapters"]["plain"]["chat_template"] is None


def test_merged_checkpoint_has_the_adapters_template(chat_base, adapters, tmp_path):
    import transformers

    merge(str(adapters / "own"), tmp_path / "merged", model=str(chat_base()))

    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == OWN
    [reply] = Session(tmp_path / "merged")(ASK, settings=SHORT)
    assert reply.prediction["tokens"]


@pytest.mark.parametrize("mode", ["switchable", "bank"])
def test_an_adapter_added_later_brings_its_template(mode, chats, adapters, tmp_path):
    artifact = shutil.copytree(chats(mode), tmp_path / "artifact")
    session = Session(artifact)
    before = session(ASK, "own", settings=SHORT)[0].prediction

    add_adapter(artifact, f"later={adapters / 'own'}")
    session.refresh()

    assert session(ASK, "later", settings=SHORT)[0].prediction == before
    assert Session(artifact)(ASK, "later", settings=SHORT)[0].prediction == before


def test_a_base_model_without_a_template_gets_that_of_its_first_adapter(
    chat_base, adapters, tmp_path
):
    base = shutil.copytree(chat_base(), tmp_path / "base")
    (base / "chat_template.jinja").unlink()

    export_onnx([str(adapters / "own")], tmp_path / "out", model=str(base), mode="switchable")

    assert read_template(tmp_path / "out") == OWN


@pytest.mark.parametrize(
    ("family", "end"),
    [("gemma", "<end_of_turn>"), ("glm-undeclared", "<|user|>"), ("llama3", "<|eot_id|>")],
)
def test_an_answer_ends_at_the_templates_mark_though_no_file_names_it(
    family, end, chat_base, tmp_path
):
    """Of all tokens the mark is made the likeliest everywhere, by a bias of the settings."""
    import transformers

    base = chat_base(family)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    number = transformers.AutoTokenizer.from_pretrained(base).convert_tokens_to_ids(end)
    adapter = make_random_adapter(model, 1, "one", task="text-generation")
    (tmp_path / "one").mkdir()
    adapter.write(tmp_path / "one")
    export_onnx([str(tmp_path / "one")], tmp_path / "out", model=str(base), mode="switchable")
    rules = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    rules["sequence_bias"] = [[[number], 1e4]]
    assert rules.get("eos_token_id") != number
    (tmp_path / "out" / "generation_config.json").write_text(json.dumps(rules))
    refreshed = _with_digests(tmp_path / "out")

    [reply] = Session(refreshed)(ASK, settings=SHORT)

    assert (reply.prediction["stopped"], reply.prediction["tokens"]) == ("end", [])
    [text] = Session(refreshed)("hi", settings=SHORT)
    assert text.prediction["stopped"] == "length"


def _with_digests(directory):
    from propulsion_export.artifacts.artifact import digest_of

    file = directory / "propulsion.json"
    manifest = json.loads(file.read_text())
    del manifest["digest"]
    for name in manifest["files"]:
        manifest["files"][name] = digest_of(directory / name)
    file.write_text(json.dumps(manifest))
    return directory


@pytest.mark.parametrize(
    ("inputs", "finding"),
    [
        ([{"role": "robot", "content": "hi"}], "conversation 1: message 1 has the role 'robot'"),
        ([{"role": "user"}], "conversation 1: message 1 has the content null"),
        ([ASK, []], "conversation 2: messages is empty"),
        ([[*ASK, {"role": "assistant", "content": "a"}]], "ends with a message of the role assist"),
        ([{"role": "system", "content": "a"}], "ends with a message of the role system"),
        ([{"role": "user", "content": "a<|im_end|>"}], "message 1 holds '<|im_end|>'"),
        (["hi", ASK], "conversation 1: is str, expected a list of messages"),
        ([{"role": "user", "content": "a" * 200}], "conversation 1: has 2"),
    ],
)
def test_what_cannot_be_answered_is_refused(inputs, finding, chats):
    with pytest.raises(UsageError) as refused:
        Session(chats("bank"))(inputs, settings=SHORT)

    assert finding in str(refused.value)


def test_messages_for_a_model_that_does_not_chat_are_refused(chats, folded, tmp_path):
    artifact = shutil.copytree(chats("switchable"), tmp_path / "artifact")
    (artifact / "chat_template.jinja").unlink()
    manifest = json.loads((artifact / "propulsion.json").read_text())
    del manifest["files"]["chat_template.jinja"], manifest["digest"]
    (artifact / "propulsion.json").write_text(json.dumps(manifest))

    with pytest.raises(UsageError, match="has no chat template"):
        Session(artifact)(ASK, "base")
    assert Session(artifact)(ASK, "own", settings=SHORT)  # which has its own
    # A conversation on the terminal is refused before the first turn.
    talk = partial(open_chat, artifact, options={}, on_note=lambda note: None)
    with pytest.raises(UsageError, match="has no chat template"):
        talk(adapter="base")
    assert talk(adapter="own")
    with pytest.raises(UsageError, match="messages: are for text-generation"):
        Session(folded)(ASK)


def run(capsys, *arguments):
    """The exit code, standard output and the last line of standard error."""
    with pytest.raises(SystemExit) as done:
        main(["run", *map(str, arguments)])
    captured = capsys.readouterr()
    return done.value.code, captured.out, (captured.err.strip().splitlines() or [""])[-1]


def test_texts_are_the_users_turns(chats, capsys):
    more = ("--chat", "--system", "be", "--max-new-tokens", 6, "--json", "--adapter", "own")

    code, out, _ = run(capsys, chats("bank"), "--text", "hi", "--text", "so", *more)

    assert code == 0
    found = json.loads(out)["predictions"]
    system = {"role": "system", "content": "be"}
    asked = [[system, {"role": "user", "content": text}] for text in ("hi", "so")]
    replies = Session(chats("bank"))(asked, "own", settings=SHORT)
    assert [one["text"] for one in found] == ["hi", "so"]
    assert [one["tokens"] for one in found] == [r.prediction["tokens"] for r in replies]


def test_an_answer_to_one_text_is_streamed(chats, capsys):
    more = ("--chat", "--max-new-tokens", 6, "--adapter", "plain")

    code, out, _ = run(capsys, chats("bank"), "--text", "hi", *more)

    [reply] = Session(chats("bank"))(ASK, "plain", settings=SHORT)
    assert code == 0
    assert out == reply.prediction["generated"] + "\n"


@pytest.mark.parametrize(
    ("name", "content", "count"),
    [
        ("list.json", json.dumps(TALK), 1),
        ("object.json", json.dumps({"messages": TALK}, indent=2), 1),
        ("lists.json", json.dumps([TALK, ASK]), 2),
        ("objects.json", json.dumps([{"messages": TALK}, {"messages": ASK}]), 2),
        ("lines.jsonl", json.dumps({"messages": TALK}) + "\n" + json.dumps({"messages": ASK}), 2),
        ("messages.jsonl", "\n".join(map(json.dumps, TALK)), 1),
    ],
)
def test_conversations_of_a_file_are_gone_on_with(name, content, count, chats, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    more = ("--max-new-tokens", 6, "--json", "--adapter", "own")

    code, out, _ = run(capsys, chats("bank"), "--conversation", tmp_path / name, *more)

    assert code == 0
    found = json.loads(out)["predictions"]
    asked = [TALK, ASK][:count]
    assert [one["messages"] for one in found] == asked
    replies = Session(chats("bank"))(asked, "own", settings=SHORT)
    assert [one["tokens"] for one in found] == [r.prediction["tokens"] for r in replies]


BAD = {
    "empty.json": "[]",
    "text.json": '{"messages": "hi"}',
    "role.jsonl": json.dumps({"messages": [{"role": "x", "content": "a"}]}),
    "other.jsonl": '{"text": "hi"}',
    "broken.json": "{",
    "system.json": json.dumps([{"role": "system", "content": "a"}, *ASK]),
}


@pytest.mark.parametrize(
    ("arguments", "code", "finding"),
    [
        (["--chat"], 2, "no text is given"),
        (["--system", "be", "--text", "hi"], 2, "--system: is for conversations"),
        (
            ["--conversation", "list.json", "--text", "hi"],
            2,
            "--conversation: is given with --text",
        ),
        (["--conversation", "none.json"], 4, "does not exist"),
        (["--conversation", "empty.json"], 4, "is empty, expected a conversation"),
        (["--conversation", "text.json"], 4, "text.json: the file: messages is 'hi'"),
        (["--conversation", "role.jsonl"], 4, "role.jsonl: line 1: message 1 has the role 'x'"),
        (["--conversation", "other.jsonl"], 4, "has no column 'messages'"),
        (["--conversation", "broken.json"], 4, "is not JSON"),
        (["--conversation", "system.json", "--system", "b"], 2, "has a system turn already"),
        (["--chat", "--text", "a<|im_start|>"], 2, "conversation 1: message 1 holds"),
        (["--chat", "--text", "hi", "--context", "a"], 2, "context: is for"),
    ],
)
def test_bad_calls_are_one_line(arguments, code, finding, chats, tmp_path, capsys, monkeypatch):
    for name, content in BAD.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)

    found, out, last = run(capsys, chats("bank"), *arguments)

    assert (found, out) == (code, "")
    assert finding in last


def test_a_chat_with_an_encoder_is_refused(folded, capsys):
    for arguments in (["--chat", "--text", "hi"], ["--chat"], ["--conversation", "x.json"]):
        code, _, last = run(capsys, folded, *arguments)
        assert code == 2
        assert "is for text-generation, the artifact is for text-classification" in last


def test_a_chat_remembers_and_forgets(chats):
    session = Session(chats("switchable"))
    chat = Chat(session, "own", system="be", settings=SHORT)
    pieces = []

    first = chat.ask("hi", pieces.append)
    second = chat.ask("so")

    system = {"role": "system", "content": "be"}
    said = [system, *ASK, {"role": "assistant", "content": first.prediction["generated"]}]
    asked = [*said, {"role": "user", "content": "so"}]
    assert "".join(pieces) == first.prediction["generated"]
    assert second.prediction == session(asked, "own", settings=SHORT)[0].prediction
    with pytest.raises(UsageError, match="holds"):
        chat.ask("<|im_end|>")
    assert len(chat.messages) == 5
    chat.reset()
    assert chat.messages == [system]
    assert chat.ask("hi").prediction == first.prediction


def test_an_interrupt_keeps_what_was_answered(chats):
    chat = Chat(Session(chats("switchable")), "own", settings=Settings(new_tokens=40))
    whole = chat.ask("hi").prediction["generated"]
    chat.reset()
    pieces = []

    def stop(piece):
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    assert chat.ask("hi", stop) is None
    kept = chat.messages[-1]["content"]
    assert kept == "".join(pieces)
    assert whole.startswith(kept)
    assert kept != whole


def test_a_terminal_chats_until_control_d(chats):
    """Two turns, /help, /reset, a refused turn, and the end, on a pseudo-terminal."""
    code = "from propulsion_export.cli import main; main()"
    arguments = ["run", str(chats("switchable")), "--chat", "--adapter", "own"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, "--max-new-tokens", "3"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        close_fds=True,
        start_new_session=True,
    )
    os.close(theirs)
    seen = ""
    try:
        for line in ("hi\n", "so\n", "/help\n", "/reset\n", "<|im_end|>\n", "\x04"):
            seen += read_until(ours, "> ")
            os.write(ours, line.encode())
        seen += read_until(ours, None)
        assert process.wait(20) == 0
    finally:
        process.kill()
        os.close(ours)

    assert seen.count("Ctrl-D ends") == 2
    assert "The conversation is forgotten." in seen
    assert "message 1 holds '<|im_end|>'" in seen
    assert "Traceback" not in seen
    [reply] = Session(chats("switchable"))(ASK, "own", settings=Settings(new_tokens=3))
    shown = reply.prediction["generated"].splitlines()
    assert not shown or shown[0][:1] in seen


def read_until(descriptor, ending, limit=60):
    """What a terminal shows until some text, or until the process has ended."""
    seen, until = "", time.monotonic() + limit
    while time.monotonic() < until:
        if not select.select([descriptor], [], [], 0.2)[0]:
            continue
        try:
            piece = os.read(descriptor, 4096).decode(errors="replace")
        except OSError:
            return seen
        if not piece:
            return seen
        seen += piece
        if ending is not None and seen.endswith(ending):
            return seen
    raise AssertionError(f"the terminal shows {seen!r}")


def test_a_chat_loads_neither_torch_nor_transformers(chats):
    code = f"""
import sys
from propulsion_export import Session, Settings
Session({str(chats("bank"))!r})({ASK!r}, "own", settings=Settings(new_tokens=2))
print(sorted({{"torch", "transformers", "onnx", "peft"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.stdout.strip() == "[]", done.stderr


def test_without_jinja_a_chat_says_what_to_install(chats):
    code = f"""
import sys
sys.modules["jinja2"] = None
from propulsion_export.cli import main
main(["run", {str(chats("bank"))!r}, "--chat", "--text", "hi"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 3
    assert "pip install 'jinja2" in done.stderr
