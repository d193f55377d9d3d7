"""Is no answer ever wrong, also while others write, refresh, compress and change the fleet?"""

import asyncio
from collections.abc import Callable

import pytest

from conftest import LONG
from lifecycle import Stage
from oracle import utc
from storm import Storm

pytestmark = pytest.mark.server


@pytest.mark.parametrize("seed", range(8 if LONG else 1))
def test_no_answer_is_wrong_while_all_goes_on(
    dsn: str, record_property: Callable[[str, object], None], seed: int
) -> None:
    Stage(dsn).close()  # stops TimescaleDB's own workers
    storm = Storm(dsn, utc(2026, 2, 7), seed, vehicles=20 if LONG else 8)
    try:
        asyncio.run(storm.run())
    finally:
        print(storm.counts)
