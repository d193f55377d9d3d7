"""Do answers and ingest stay as fast when there is a year behind them, or ten times the devices?

    python benchmarks/growth.py --database-url postgresql://postgres@127.0.0.1/postgres

A database for each size is seeded in the order of arrival, with a chunk a day: 1,000 meters and as
many vehicles with 1, 30, 90 and 400 days, and 10,000 with one day (a tenth of that on the embedded
engine). Round by round, each of them in turn is asked for the last 24 hours of random vehicles and
sent single readings and batches, by the service on it. What counts is the ratio to one day.

The readings come from the devices of the other benchmarks, not the seeded ones: the answers stay
the same, and every database gets the same new rows.
"""

import argparse
import contextlib
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from answer_latency import ANSWER, get, tell
from harness import RESULTS, Report, Service, Spread, argument_parser, parse_arguments, run_wrk
from load import Timeline, render_batches, start_load
from seed import DEFAULT_STEPS, Fleet, newest_half_past, open_seeded, parse_steps

POST_DEVICES = 10_000  # of single_post.lua
BATCH = 500


class Size(NamedTuple):
    """How much there is in a database."""

    devices: int
    days: int

    def __str__(self) -> str:
        return f"{self.devices:,} devices, {self.days} day{'s' if self.days > 1 else ''}"


class Measure(NamedTuple):
    """One thing that is measured; a rate, or milliseconds."""

    name: str
    title: str
    is_rate: bool


MEASURES = [
    Measure("answer_p50_ms", "24 h answer, c1, p50 ms", False),
    Measure("answers", "24 h answers/s, c64", True),
    Measure("single_posts", "single POSTs/s, c64", True),
    Measure("batch_readings", f"readings/s in batches of {BATCH}", True),
]


def run_round(dsn: str, fleet: Fleet, timeline: Timeline, seconds: float) -> dict[str, float]:
    path = f"{ANSWER}?hours=24&until={tell(fleet.until)}"
    with Service(dsn) as service:
        get(service.url, path, fleet, 8, 1)()  # the connections are opened, the plans made
        alone = get(service.url, path, fleet, 1, seconds)()
        many = get(service.url, path, fleet, 64, seconds)()
        url = f"{service.url}/v1/ingest"
        since = timeline.since
        env = {"SINCE": f"{since.timestamp() * 1000:.0f}"}
        posts = run_wrk("single_post.lua", url, 64, seconds, env, expected={201})
        timeline.move(since, sum(posts.statuses.values()))
        since = timeline.since
        bodies = partial(render_batches, POST_DEVICES, BATCH, since)
        batches = start_load(url, bodies, 2, seconds=seconds).result()
        sent = batches.count(200) * BATCH
        assert [*batches.times] == [200], f"the service answered {[*batches.times]}"
        timeline.move(since, sent)
    return {
        "answer_p50_ms": alone.p50,
        "answers": many.rate,
        "single_posts": posts.rate,
        "batch_readings": sent / batches.seconds,
    }


def measure(sizes: Sequence[Size], arguments: argparse.Namespace) -> dict[Size, dict[str, Spread]]:
    until = newest_half_past()
    rounds: dict[Size, list[dict[str, float]]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        places = {}
        for size in sizes:
            # Of a large fleet a day is enough readings with fewer of yesterday's.
            steps = DEFAULT_STEPS if size.devices < POST_DEVICES else "0:60,600"
            fleet = Fleet(size.devices, size.days, until, parse_steps(steps))
            dsn = stack.enter_context(open_seeded(arguments.database_url, fleet))
            places[size] = dsn, fleet, Timeline(POST_DEVICES)
        order = list(places.items())
        for _ in range(arguments.rounds):
            order = order[1:] + order[:1]  # another one is the first in each round
            for size, (dsn, fleet, timeline) in order:
                rounds[size].append(run_round(dsn, fleet, timeline, arguments.seconds))
    return {
        size: {m.name: Spread.of(one[m.name] for one in done) for m in MEASURES}
        for size, done in rounds.items()
    }


# ---- The plot ---------------------------------------------------------------------------------

WIDTH, HEIGHT = 780, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 44, 48, 56
COLORS = ("#1f6feb", "#0a7f5a", "#b3541e", "#7a3e9d")


def render_plot(ratios: dict[str, list[tuple[int, float]]]) -> str:
    """An SVG: how many times as long each takes, by days of history on a scale of powers."""
    days = sorted({day for points in ratios.values() for day, _ in points})
    top = max(2.0, *(ratio for points in ratios.values() for _, ratio in points)) * 1.05
    positions = {day: i / max(1, len(days) - 1) for i, day in enumerate(days)}

    def x(day: int) -> float:
        return LEFT + positions[day] * (WIDTH - LEFT - RIGHT)

    def y(ratio: float) -> float:
        return HEIGHT - BOTTOM - ratio / top * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        f' width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="13">',
        "<title>Time by days of history, as a ratio to one day</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" font-size="15" fill="#222222">'
        "How many times as long, with more days behind it</text>",
    ]
    step = 0.5 if top < 4 else 1.0
    for i in range(int(top / step) + 1):
        ratio = i * step
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(ratio):.1f}" y2="{y(ratio):.1f}"'
            f' stroke="{"#888888" if ratio == 1 else "#dddddd"}"/>'
            f'<text x="{LEFT - 8}" y="{y(ratio) + 4:.1f}" text-anchor="end" fill="#555555">'
            f"{ratio:g}×</text>"
        )
    for day in days:
        parts.append(
            f'<text x="{x(day):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle"'
            f' fill="#555555">{day} day{"s" if day > 1 else ""}</text>'
        )
    for i, (title, points) in enumerate(ratios.items()):
        color = COLORS[i % len(COLORS)]
        path = " ".join(f"{x(day):.1f},{y(ratio):.1f}" for day, ratio in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{x(day):.1f}" cy="{y(ratio):.1f}" r="3.5" fill="{color}"/>'
            for day, ratio in points
        ]
        column = LEFT + i * (WIDTH - LEFT - RIGHT) / len(ratios)
        parts.append(
            f'<circle cx="{column + 5:.1f}" cy="{HEIGHT - 16}" r="4" fill="{color}"/>'
            f'<text x="{column + 14:.1f}" y="{HEIGHT - 12}" fill="#222222">{title}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def ratio_to(first: Spread, other: Spread, is_rate: bool) -> float:
    """How many times as long it takes."""
    return first.median / other.median if is_rate else other.median / first.median


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--devices", type=int, help="default: 1000; embedded 100, quick 50")
    parser.add_argument("--days", type=int, nargs="+", help="default: 1 30 90 400; quick 1 10")
    parser.add_argument("--fleet", type=int, help="default: 10,000; embedded 1000, quick 0")
    arguments = parse_arguments(parser)
    quick = arguments.quick
    usual = 1000 if arguments.database_url else 100
    devices = arguments.devices or (50 if quick else usual)
    days = arguments.days or ([1, 10] if quick else [1, 30, 90, 400])
    large = 0 if quick else 10 * usual
    large = large if arguments.fleet is None else arguments.fleet
    sizes = [Size(devices, n) for n in days] + [Size(large, 1)] * bool(large)

    report = Report(__file__, "What history costs", arguments)
    report.say(
        "A chunk a day in either table of history. In brackets the ratio of times: 2 is twice as "
        "slow as with the first database."
    )
    report.say_shared(arguments)
    report.open_table("meters and as many vehicles", *(m.title for m in MEASURES))
    done = measure(sizes, arguments)
    base = done[sizes[0]]
    ratios: dict[str, list[tuple[int, float]]] = {m.title: [] for m in MEASURES}
    for size, figures in ((size, done[size]) for size in sizes):
        cells = []
        for m in MEASURES:
            ratio = ratio_to(base[m.name], figures[m.name], m.is_rate)
            if size.devices == devices:
                ratios[m.title].append((size.days, ratio))
            spread = format(figures[m.name], ",.0f" if m.is_rate else ".2f")
            cells.append(f"{spread} [{ratio:.2f}]")
        report.add_row(str(size), *cells, devices=size.devices, days=size.days, **figures)
    if not quick:
        name = "growth.svg" if arguments.database_url else "growth_embedded.svg"
        report.say(f"\n![How many times as long, by days of history]({name})")
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / name).write_text(render_plot(ratios))
    report.write()


if __name__ == "__main__":
    main()
