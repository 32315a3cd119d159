"""The demo's second half: a language model learns to answer from conversations."""

import json
import sys

from demo_steps import DATA, OUTPUT, Row, judge, step
from smollm2 import model_file

QUESTION = "a man who makes shoes"
ANSWER = "person"
_MOST = 12  # tokens of an answer


def chat() -> list[Row]:
    """Train a chat adapter, export it in float32 and int4, ask and judge both."""
    adapter = f"{OUTPUT}/adapters/chat"
    metrics = step(
        "Train an adapter on conversations",
        *("train", "-m", str(model_file()), "-d", f"{DATA}/chat.train.jsonl"),
        *("--validation", f"{DATA}/chat.held-out.jsonl", "--task", "text-generation"),
        *("--placement", "attention", "--epochs", "1", "--batch-size", "8"),
        *("--learning-rate", "0.003", "-o", adapter),
    )
    print(
        f"chat: loss of the answers {metrics['validation_loss']:.2f}, "
        f"the base model's {metrics['base_loss']:.2f}"
    )
    step(
        "Its graph, in float32",
        *("onnx", "-a", adapter, "--mode", "switchable", "-o", f"{OUTPUT}/chat-float32"),
        "--no-parity",
    )
    step(
        "Its graph, the base model in int4",
        *("onnx", "-a", adapter, "--mode", "switchable", "--quantize", "int4"),
        *("-o", f"{OUTPUT}/chat-int4", "--no-parity"),
    )
    for artifact in ("chat-float32", "chat-int4"):
        step(
            "What onnxruntime-genai loads",
            *("package", f"{OUTPUT}/{artifact}", "--layout", "genai"),
            *("-o", f"{OUTPUT}/{artifact}-served"),
        )
        check(f"run, {artifact}", ask(artifact, "chat"), ask(artifact, "base"))
        check(f"onnxruntime-genai, {artifact}", *ask_genai(f"{artifact}-served"))
    return [judge("chat-float32"), judge("chat-int4")]


def ask(artifact: str, adapter: str) -> str:
    """What `run` answers to the question."""
    output = step(
        f"Ask {artifact} with the adapter {adapter}",
        *("run", f"{OUTPUT}/{artifact}", "--chat", "--text", QUESTION, "--adapter", adapter),
        *("--max-new-tokens", str(_MOST)),
    )
    return output["predictions"][0]["generated"]


def ask_genai(package: str) -> tuple[str, str]:
    """What onnxruntime-genai answers with the adapter and without."""
    import onnxruntime_genai as og

    directory = OUTPUT / package
    model = og.Model(str(directory))
    tokenizer = og.Tokenizer(model)
    adapters = og.Adapters(model)
    adapters.load(str(directory / "adapters" / "chat.onnx_adapter"), "chat")
    messages = json.dumps([{"role": "user", "content": QUESTION}])
    prompt = tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    answers = []
    for adapter in ("chat", None):
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + _MOST, do_sample=False)
        generator = og.Generator(model, params)
        if adapter is not None:
            generator.set_active_adapter(adapters, adapter)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        answers.append(tokenizer.decode(generator.get_sequence(0)[len(prompt) :]))
    return answers[0], answers[1]


def check(where: str, adapted: str, base: str) -> None:
    """Show both answers; only the adapted one may be the right one."""
    print(f"{where}: {QUESTION!r} -> {adapted.strip()!r}; the base model: {base.strip()!r}")
    if adapted.strip() != ANSWER or base.strip() == ANSWER:
        sys.exit(f"{where}: expected {ANSWER!r} from the adapter and another answer from the base")
