"""Would the life of the platform notice? Bugs are planted, one at a time, and must be found.

Each mutation is a replacement in the product's own SQL, which must apply. The same tours that
pass in test_lifecycle must then meet a wrong answer. Two of the books that rollup_dirty_ranges()
reads have none: what the watermark says is in the materialization log as well (TimescaleDB 2.23 and
2.28), and the ranges that a refresh is at work on are never all that marks an hour.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from lifecycle import Stage, WrongAnswer, tour

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    """Text in a file, how often it stands there, and what it becomes."""

    path: str
    old: str
    new: str
    times: int = 1
    tour: str = "late rows"


WRITER = "sql/28_record.sql"
ROLLUP = "sql/10_rollup.sql"
MEASURES = "sql/20_measures.sql"
PLAUSIBILITY = "sql/25_plausibility.sql"
CHANGES = "sql/26_changes.sql"
FLEET = "sql/36_fleet.sql"
ANSWER = "sql/30_performance.sql"
DIRTY = """    FROM aggregate
    JOIN _timescaledb_catalog.continuous_aggs_{log}_invalidation_log
      ON {key}"""

MUTATIONS = {
    # Which hours of the rollup may be read.
    "late rows are not dirty": Mutation(
        ROLLUP,
        DIRTY.format(log="hypertable", key="hypertable_id = raw_hypertable_id"),
        DIRTY.format(log="hypertable", key="hypertable_id = raw_hypertable_id AND false"),
    ),
    "rows that a refresh elsewhere noted are not dirty": Mutation(
        ROLLUP,
        DIRTY.format(log="materialization", key="materialization_id = mat_hypertable_id"),
        DIRTY.format(log="materialization", key="materialization_id = mat_hypertable_id AND false"),
    ),
    "the last dirty hour is cut off": Mutation(
        ROLLUP, "date_bin(hour, d.highest, 'epoch') + hour", "date_bin(hour, d.highest, 'epoch')"
    ),
    "a dirty range begins an hour late": Mutation(
        ROLLUP, "date_bin(hour, d.lowest, 'epoch'),", "date_bin(hour, d.lowest, 'epoch') + hour,"
    ),
    "dropped hours are read from raw rows": Mutation(
        ROLLUP, " + whole * dropped;", ";", tour="retention"
    ),
    "an hour that is cut is read from the rollup": Mutation(
        MEASURES,
        "ELSE date_bin('1 hour', lower(r), 'epoch') + INTERVAL '1 hour' END AS lo",
        "ELSE date_bin('1 hour', lower(r), 'epoch') END AS lo",
    ),
    "a cut in dropped raw rows is not refused": Mutation(
        MEASURES, "IF readings > 0 THEN", "IF false THEN", tour="retention"
    ),
    # What was corrected, and what cannot be.
    "what was voided is stored again": Mutation(
        WRITER,
        "ts = i.ts LIMIT 1) IS NULL",
        "ts = i.ts AND false LIMIT 1) IS NULL",
        2,
        tour="another fleet",
    ),
    "a voided reading that was the newest is stored again": Mutation(
        WRITER, "c.ts = r.ts LIMIT 1)", "c.ts = r.ts AND false LIMIT 1)", 2, tour="another fleet"
    ),
    "the live row stays when its reading is voided": Mutation(
        CHANGES, "AND l.ts > until) THEN", "AND true) THEN", 2, tour="another fleet"
    ),
    "a reading that follows a late one is not judged again": Mutation(
        PLAUSIBILITY,
        "coalesce(public.next_reading_ts(device_class, device, until), until)",
        "until",
    ),
    "no reading is judged": Mutation(WRITER, "IF doubtful IS NOT NULL THEN", "IF false THEN", 2),
    "suspects of a meter count while it feeds another": Mutation(
        ANSWER,
        "public.suspect_count('meter', piece.meter_id, piece.since, piece.until)",
        "public.suspect_count('meter', piece.meter_id, window_since, window_until)",
        tour="another fleet",
    ),
    "the fleet forgets who fed whom": Mutation(
        FLEET,
        "ON s.device_id = u.meter_id AND s.ts >= u.since AND s.ts < u.until",
        "ON s.device_id = u.meter_id",
        tour="another fleet",
    ),
    "the fleet's registers begin at zero": Mutation(
        FLEET, "public.fleet_before(device_class, s.device, s.run_since, hours.rolled)", "NULL"
    ),
    # What a device measured.
    "the end of a raw piece is part of it": Mutation(
        MEASURES, "h.ts >= since AND h.ts < until;", "h.ts >= since AND h.ts <= until;", 2
    ),
    "the begin of a raw piece is not part of it": Mutation(
        MEASURES,
        "h.ts >= since AND h.ts < until ORDER BY h.ts\n",
        "h.ts > since AND h.ts < until ORDER BY h.ts\n",
        times=2,
    ),
    "the hour after a rolled piece is part of it": Mutation(
        MEASURES, "hour >= since AND hour < until) h", "hour >= since AND hour <= until) h", 2
    ),
    "the hour after a rolled piece of an interval device is part of it": Mutation(
        MEASURES, "hour >= since AND hour < until;", "hour >= since AND hour <= until;", 2
    ),
    "first and last of a rolled piece are swapped": Mutation(
        MEASURES,
        "public.first(kwh_first, hour), public.last(kwh_last, hour)",
        "public.last(kwh_last, hour), public.first(kwh_first, hour)",
        2,
    ),
    "no step between rolled hours": Mutation(
        MEASURES, "sum(kwh_increase + step)", "sum(kwh_increase)", 2
    ),
    "no step between pieces": Mutation(
        MEASURES,
        "kwh := kwh + public.register_step(m.kwh_first, previous_kwh) + m.kwh_increase",
        "kwh := kwh + m.kwh_increase",
    ),
    "the step into a window is forgotten": Mutation(
        MEASURES, "previous_kwh := public.register_before(device_class, device, since);", "NULL;"
    ),
    "the step into a window is sought for ten days": Mutation(
        MEASURES,
        "found_kwh := public.register_long_before(device_class, device, instant, until);",
        "RETURN NULL;",
        tour="silence",
    ),
    "the step into a window ignores what is not rolled up": Mutation(
        MEASURES, "IF since < reached THEN", "IF false THEN", tour="silence"
    ),
    "the step into a window is sought for 400 days": Mutation(
        MEASURES,
        "ARRAY[INTERVAL '40 days', INTERVAL '400 days', NULL]",
        "ARRAY[INTERVAL '40 days', INTERVAL '400 days']",
        tour="silence",
    ),
    "a reset of a register is a step back": Mutation(
        "migrations/0004_counter_increase.sql",
        "              WHEN value >= previous THEN value - previous\n              ELSE value END",
        "              ELSE value - previous END",
    ),
    # The answer.
    "the end of an assignment is part of it": Mutation(
        ANSWER,
        "least(coalesce(upper(a.during), 'infinity'), window_until) AS until",
        "least(coalesce(upper(a.during) + INTERVAL '1 microsecond', 'infinity'),"
        " window_until) AS until",
    ),
    "coverage promises the whole window": Mutation(
        ANSWER,
        "extract(epoch FROM piece.until - piece.since)",
        "extract(epoch FROM window_until - window_since)",
    ),
    "only what the last meter fed is metered": Mutation(
        ANSWER,
        "answer.metered_kwh_delivered_dc := answer.metered_kwh_delivered_dc + dc.kwh",
        "answer.metered_kwh_delivered_dc := dc.kwh",
    ),
    "an hour that clocks repeat is one": Mutation(
        "sql/35_series.sql", "ELSE local - (t AT TIME ZONE 'UTC') END", "ELSE NULL END"
    ),
    "energy views step from a bucket's own end": Mutation(
        "sql/40_energy.sql",
        "p.meter_id = h.meter_id AND p.hour < h.hour",
        "p.meter_id = h.meter_id AND p.hour <= h.hour",
    ),
    # What may go.
    "the gate of retention is open": Mutation(
        "sql/50_policies.sql", "  RETURN unrolled;", "  RETURN 0;", tour="retention"
    ),
    # What is written.
    "the newest to arrive is live": Mutation(WRITER, "    WHERE live.ts < excluded.ts\n", "", 2),
    "a conflicting reading takes the place": Mutation(
        WRITER,
        "      ON CONFLICT DO NOTHING\n      RETURNING meter_id",
        "      ON CONFLICT (meter_id, ts) DO UPDATE SET kwh_consumed_ac = excluded.kwh_consumed_ac"
        "      RETURNING meter_id",
    ),
    "the oldest of a body is live": Mutation(
        WRITER, "NULL ORDER BY meter_id, ts DESC", "NULL ORDER BY meter_id, ts"
    ),
}


@pytest.fixture(scope="module")
def stage(module_dsn: str) -> Iterator[Stage]:
    stage = Stage(module_dsn)
    yield stage
    stage.close()


def statements_with(text: str, part: str) -> list[str]:
    """The statements that make the functions and views in which a part stands."""
    found = [match.start() for match in re.finditer(re.escape(part), text)]
    return list(dict.fromkeys(_statement_at(text, position) for position in found))


def _statement_at(text: str, position: int) -> str:
    begin = text.rindex("\nCREATE ", 0, position) + 1
    is_view = "VIEW" in text[begin : text.index("\n", begin)]
    end = text.index(";\n", position) + 1 if is_view else text.index("$$;", position) + 3
    return text[begin:end].replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION")


@pytest.fixture
def plant(
    stage: Stage,
) -> Iterator[Callable[[Mutation], None]]:
    originals = []

    def plant(mutation: Mutation) -> None:
        text = (ROOT / mutation.path).read_text("utf-8")
        assert text.count(mutation.old) == mutation.times, "the mutation does not apply"
        for statement in statements_with(text, mutation.old):
            stage.db.execute(statement.replace(mutation.old, mutation.new).encode())
            originals.append(statement)

    yield plant
    for statement in originals:
        stage.db.execute(statement.encode())


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_bug_is_found(stage: Stage, plant: Callable[[Mutation], None], name: str) -> None:
    mutation = MUTATIONS[name]
    plant(mutation)
    stage.tally.steps_until_wrong = None
    before = stage.tally.steps
    with pytest.raises(WrongAnswer) as wrong:
        tour(stage, mutation.tour)
    assert stage.tally.steps_until_wrong
    print(f"{name}: {stage.tally.steps_until_wrong - before} steps, {wrong.value}")
