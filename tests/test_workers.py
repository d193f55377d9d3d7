"""Do several processes of the service lose nothing, when one of them dies and when all end?"""

import multiprocessing
from pathlib import Path

from energy_platform.http.metrics import Metrics, forget_gauges, share_metrics

SECONDS_MAX = 60.0


def read_lines(text: str) -> dict[str, float]:
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def count_and_scrape(folder: str, number: int, queued: int, path: Path) -> None:
    """A worker that counts three readings and has some in its queue, and what it would answer."""
    share_metrics(folder, number)
    metrics = Metrics()
    metrics.readings["stored"].inc(3)
    metrics.queue_readings.set(queued)
    path.write_bytes(metrics.render())


def test_a_dead_workers_counts_stay_and_its_gauges_do_not(tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    spawn = multiprocessing.get_context("spawn")

    def run(number: int, queued: int) -> list[float]:
        path = tmp_path / "answer"
        worker = spawn.Process(target=count_and_scrape, args=(str(folder), number, queued, path))
        worker.start()
        worker.join(SECONDS_MAX)
        found = read_lines(path.read_text("utf-8"))
        return [found['energy_readings_total{outcome="stored"}'], found["energy_queue_readings"]]

    assert run(0, queued=5) == [3, 5]
    assert run(1, queued=2) == [6, 7]
    forget_gauges(str(folder), 0)
    assert run(1, queued=1) == [9, 1]  # the next one in the place of the second
    assert run(0, queued=4) == [12, 5]
    assert len(list(folder.iterdir())) <= 6
