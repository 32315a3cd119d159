"""Send texts for random adapters to the reference server; with two servers, compare them.

    .venv/bin/python samples/load.py --url http://127.0.0.1:8000 --requests 2000 --concurrency 32
    .venv/bin/python samples/load.py --against http://127.0.0.1:8001

`--against` is a server with `--batch-by-adapter`. They take turns, so that other work on the
machine affects both.
"""

import argparse
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

GLOSSES = Path(__file__).parent / "data" / "topic.held-out.jsonl"


@dataclass(frozen=True)
class Load:
    """The results of one run."""

    latencies: Sequence[float]  # ms, of the answered requests
    seconds: float
    statuses: Counter[int]
    rows_per_batch: float

    @property
    def throughput(self) -> float:
        return len(self.latencies) / self.seconds

    def __str__(self) -> str:
        p50, p99 = np.percentile(self.latencies, [50, 99])
        others = {status: count for status, count in self.statuses.items() if status != 200}
        return (
            f"{len(self.latencies)} of {self.statuses.total()} answered   "
            f"{self.throughput:.1f}/s   p50 {p50:.1f} ms   p99 {p99:.1f} ms   "
            f"{self.rows_per_batch:.1f} rows/batch" + (f"   not 200: {others}" if others else "")
        )


def get(url: str, path: str) -> Any:
    connection = HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("GET", path)
    body = json.loads(connection.getresponse().read())
    connection.close()
    return body


def send(url: str, rows: Sequence[dict[str, str]]) -> list[tuple[int, float]]:
    """Send rows one after the other on one connection; status and milliseconds of each."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=60)
    found = []
    for row in rows:
        started = time.perf_counter()
        connection.request(
            "POST", "/predict", json.dumps(row), {"content-type": "application/json"}
        )
        response = connection.getresponse()
        body = json.loads(response.read())
        found.append((response.status, 1000 * (time.perf_counter() - started)))
        assert response.status != 200 or body["adapter"] == row["adapter"], body
    connection.close()
    return found


def load(url: str, rows: Sequence[dict[str, str]], concurrency: int) -> Load:
    before = get(url, "/metrics")["since_start"]
    started = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as clients:
        parts = clients.map(
            send, [url] * concurrency, [rows[n::concurrency] for n in range(concurrency)]
        )
        found = [one for part in parts for one in part]
    seconds = time.perf_counter() - started
    after = get(url, "/metrics")["since_start"]
    answered, batches = (after[name] - before[name] for name in ("answered", "batches"))
    latencies = [taken for status, taken in found if status == 200]
    return Load(latencies, seconds, Counter(status for status, _ in found), answered / batches)


def mixed_rows(adapters: Sequence[str], count: int, seed: int) -> list[dict[str, str]]:
    chooser = random.Random(seed)
    texts = [json.loads(line)["text"] for line in GLOSSES.read_text().splitlines()]
    return [
        {"text": chooser.choice(texts), "adapter": chooser.choice(adapters)} for _ in range(count)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Put load on the reference server.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--against", help="URL of another server, to compare with")
    parser.add_argument("--requests", type=int, default=2000, help="per round")
    parser.add_argument("--concurrency", type=int, default=32, help="number of clients")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args(arguments)
    urls = [chosen.url, *([chosen.against] if chosen.against else [])]
    adapters = [name for name in get(chosen.url, "/adapters") if name != "base"]
    print(f"{chosen.concurrency} clients, {len(adapters)} adapters")
    ratios = []
    for seed in range(chosen.rounds):
        rows = mixed_rows(adapters, chosen.requests, seed)
        loads = [load(url, rows, chosen.concurrency) for url in urls]
        for url, done in zip(urls, loads, strict=True):
            print(f"{url}  {done}", flush=True)
        ratios.append(loads[0].throughput / loads[-1].throughput)
    if chosen.against:
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"throughput: {statistics.median(ratios):.2f} times the other's (rounds: {each})")


if __name__ == "__main__":
    main()
