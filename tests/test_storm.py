"""Is no answer ever wrong, also while others write, refresh, compress and change the fleet?"""

import asyncio
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from conftest import LONG
from lifecycle import stop_workers
from oracle import utc
from storm import Storm

pytestmark = pytest.mark.server


@pytest.mark.parametrize("seed", range(12 if LONG else 2))
def test_no_answer_is_wrong_while_all_goes_on(
    dsn: str,
    db: psycopg.Connection[Any],
    record_property: Callable[[str, object], None],
    seed: int,
) -> None:
    stop_workers(db)
    storm = Storm(dsn, utc(2026, 2, 7), seed, vehicles=20 if LONG else 8)
    try:
        asyncio.run(storm.run())
    finally:
        counts = storm.counts
        record_property("exactness", {"answers under way": counts["answers"]})
    assert counts["stored"] == sum(map(len, storm.sent.values()))
    assert counts["answers with a choice"] > 100
    assert counts["refreshes"] > 10
    assert counts["answers refused"] * 100 < counts["answers"]
    assert counts["answers not judged"] * 20 < counts["answers"]
