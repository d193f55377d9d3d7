"""Single POSTs, batches and answers of a running service, durable, with wrk and httpx.

    python benchmarks/first_figures.py --url http://127.0.0.1:8080

The service should hold a simulated fleet first (`energy-platform simulate --duration PT0S`).
Client, service and database share the machine: only ratios taken in one run travel to another one.
Medians of several rounds.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx

HERE = Path(__file__).parent


def run_wrk(script: str, url: str, connections: int, seconds: int) -> tuple[float, float, float]:
    """Requests a second, p50 and p99 in ms."""
    finished = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency",
         "-s", str(HERE / script), url],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    text = finished.stdout
    if "Non-2xx" in text:
        sys.exit(f"the service answered errors:\n{text}")
    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", text)[1])  # type: ignore[index]
    p50, p99 = (_milliseconds(text, percent) for percent in ("50%", "99%"))
    return rate, p50, p99


def _milliseconds(text: str, percent: str) -> float:
    value, unit = re.search(rf"{percent}\s+([\d.]+)(us|ms|s)\b", text).groups()  # type: ignore[union-attr]
    return float(value) * {"us": 0.001, "ms": 1, "s": 1000}[unit]


def post_batches(url: str, size: int, seconds: float, clients: int) -> float:
    """Readings a second, both kinds in every body, each instant once."""
    stop = time.monotonic() + seconds
    start = datetime.now(UTC) - timedelta(minutes=50)
    run = time.monotonic_ns() % 1_000_000

    def send(client_number: int) -> int:
        stored = body_number = 0
        with httpx.Client(base_url=url, timeout=60) as client:
            name = f"B-{client_number}-{size}"
            while time.monotonic() < stop:
                at = start + timedelta(seconds=body_number % 2900, microseconds=run + client_number)
                instant = at.isoformat()
                items = [
                    f'{{"meterId":"{name}-{i}","kwhConsumedAc":1.5,"voltage":230,'
                    f'"timestamp":"{instant}"}}'
                    if i % 2
                    else f'{{"vehicleId":"{name}-{i}","soc":75,"kwhDeliveredDc":1.2,'
                    f'"batteryTemp":36,"timestamp":"{instant}"}}'
                    for i in range(size)
                ]
                answer = client.post(
                    "/v1/ingest",
                    content=f"[{','.join(items)}]",
                    headers={"content-type": "application/json"},
                )
                stored += answer.json()["stored"]
                body_number += 1
        return stored

    began = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        total = sum(pool.map(send, range(clients)))
    return total / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=8)
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("wrk is needed (Debian: apt-get install wrk)")
    os.environ.setdefault("VEHICLES", "200")
    print("| what | rate | p50 ms | p99 ms |\n|---|---|---|---|")
    for title, script, connections in (
        ("single POST, c1", "single_post.lua", 1),
        ("single POST, c64", "single_post.lua", 64),
        ("GET performance, c1", "performance.lua", 1),
        ("GET performance, c64", "performance.lua", 64),
    ):
        rounds = [
            run_wrk(script, arguments.url, connections, arguments.seconds)
            for _ in range(arguments.rounds)
        ]
        rate, p50, p99 = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"| {title} | {rate:,.0f} req/s | {p50:.1f} | {p99:.1f} |", flush=True)
    for size in (500, 1000):
        rate = statistics.median(
            post_batches(arguments.url, size, arguments.seconds, clients=2)
            for _ in range(arguments.rounds)
        )
        print(f"| batch of {size}, 2 clients | {rate:,.0f} readings/s | | |", flush=True)


if __name__ == "__main__":
    main()
