"""Do answers stay the oracle's, whatever happens and in whatever order?

`lifecycle.Life` is what can happen. Here it happens, in eras from 2000 to 2099: on tours that stand
on every edge, and in lives that Hypothesis makes up.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import Phase

from conftest import LONG
from lifecycle import ERAS, ROLLUPS, TOURS, Stage, Tally, explore, tour

EXAMPLES, STEPS = (13, 60) if LONG else (2, 30)
TOURED = [
    (name, era) for name, (its_era, _) in TOURS.items() for era in (ERAS if LONG else [its_era])
]


RecordProperty = Callable[[str, object], None]


@pytest.fixture(scope="module")
def one_stage(module_dsn: str) -> Iterator[Stage]:
    stage = Stage(module_dsn)
    yield stage
    stage.close()


@pytest.fixture
def stage(one_stage: Stage) -> Stage:
    one_stage.tally = Tally()
    return one_stage


@pytest.mark.parametrize(("name", "era"), TOURED)
def test_a_tour_of_all_that_can_happen(
    stage: Stage, record_property: RecordProperty, name: str, era: str
) -> None:
    try:
        tour(stage, name, era)
    finally:
        record_property("exactness", stage.tally.as_counts())


@pytest.mark.parametrize("era", ERAS)
def test_answers_are_the_oracles(stage: Stage, record_property: RecordProperty, era: str) -> None:
    seed = list(ERAS).index(era)
    try:
        explore(stage, ERAS[era], seed=seed, examples=EXAMPLES, steps=STEPS, phases=Phase)
    finally:
        record_property("exactness", stage.tally.as_counts())


def test_a_life_begins_as_on_a_new_database(stage: Stage) -> None:
    """Or what an example finds would depend on those before it."""

    def fetch_state() -> dict[str, list[tuple[Any, ...]]]:
        tables = [f"_timescaledb_catalog.{book}" for book in Stage.BOOKS]
        tables += ["_timescaledb_catalog.chunk", "_timescaledb_catalog.dimension_slice"]
        tables += ["meter", "vehicle", "charging_assignment", "job_run", "quarantine"]
        tables += [f"{rollup}_materialized" for rollup in ROLLUPS]
        return {table: sorted(stage.db.execute(f"TABLE {table}".encode())) for table in tables}

    stage.reset()
    before = fetch_state()
    tour(stage, "retention")
    assert fetch_state() != before
    stage.reset()
    assert fetch_state() == before
    assert before["_timescaledb_catalog.chunk"] == []
