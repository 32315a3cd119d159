"""Make the small data sets of the samples from WordNet 3.0's glosses.

    python samples/data/prepare.py WORDNET_DIR

WORDNET_DIR holds `data.noun`, `data.verb`, `data.adj` and `data.adv`, as Debian's package
`wordnet-base` installs them in /usr/share/wordnet. The result is committed beside this script, so
nobody needs to run it; it is here to show where every row comes from, and it gives the same rows
again. WordNet's licence (WORDNET-LICENSE) allows redistribution with its notice.
"""

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Numbers of WordNet's lexicographer files (lexnames(5WN)).
TOPICS = {
    4: "act",
    5: "animal",
    6: "artifact",
    7: "attribute",
    8: "body",
    9: "cognition",
    10: "communication",
    13: "food",
    15: "location",
    18: "person",
    20: "plant",
    26: "state",
}
PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
TOPIC_ROWS = (250, 80)  # training and held-out rows of each class
PART_OF_SPEECH_ROWS = (400, 100)
CHAT_ROWS = (15, 5)
SEED = 3


def glosses(file: Path) -> Iterator[tuple[int, str]]:
    """Each synset's lexicographer file number and the definition part of its gloss."""
    for line in file.read_text(encoding="ascii").splitlines():
        if line.startswith("  "):  # the licence at the top
            continue
        fields, gloss = line.split(" | ", 1)
        # Example sentences stand in quotes behind the definition and may name the word itself.
        definition = re.split(r';\s*"|^\s*"', gloss, maxsplit=1)[0].strip(" ;")
        if len(definition.split()) >= 4:
            yield int(fields.split()[1]), definition


def split(by_label: dict[str, set[str]], rows: tuple[int, int]) -> tuple[list[dict], list[dict]]:
    """Draw `rows` training and held-out rows per label; no text has two labels."""
    chooser = random.Random(SEED)
    ambiguous = {
        text
        for label, texts in by_label.items()
        for other, others in by_label.items()
        if label != other
        for text in texts & others
    }
    training, held_out = [], []
    for label in sorted(by_label):
        texts = chooser.sample(sorted(by_label[label] - ambiguous), sum(rows))
        labelled = [{"text": text, "label": label} for text in texts]
        training += labelled[: rows[0]]
        held_out += labelled[rows[0] :]
    chooser.shuffle(training)
    chooser.shuffle(held_out)
    return training, held_out


def conversations(rows: list[dict], each: int) -> list[dict]:
    """The first `each` rows of every label, as a question and its answer."""
    taken: Counter[str] = Counter()
    chosen = []
    for row in rows:
        if taken[row["label"]] < each:
            taken[row["label"]] += 1
            question = {"role": "user", "content": row["text"]}
            answer = {"role": "assistant", "content": row["label"]}
            chosen.append({"messages": [question, answer]})
    return chosen


def write(name: str, rows: list[dict]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (Path(__file__).parent / name).write_text(lines, encoding="utf-8")


def main(wordnet: Path) -> None:
    topics: dict[str, set[str]] = {name: set() for name in TOPICS.values()}
    for number, text in glosses(wordnet / "data.noun"):
        if number in TOPICS:
            topics[TOPICS[number]].add(text)
    parts = {
        label: {text for _, text in glosses(wordnet / f"data.{suffix}")}
        for suffix, label in PARTS_OF_SPEECH.items()
    }
    for task, by_label, rows in (
        ("topic", topics, TOPIC_ROWS),
        ("part-of-speech", parts, PART_OF_SPEECH_ROWS),
    ):
        training, held_out = split(by_label, rows)
        write(f"{task}.train.jsonl", training)
        write(f"{task}.held-out.jsonl", held_out)
        if task == "topic":
            write("chat.train.jsonl", conversations(training, CHAT_ROWS[0]))
            write("chat.held-out.jsonl", conversations(held_out, CHAT_ROWS[1]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
