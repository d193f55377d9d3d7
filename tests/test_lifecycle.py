"""Do answers stay the oracle's, whatever happens and in whatever order?

`lifecycle.Life` is what can happen. Here it happens, in eras from 2000 to 2099: on tours that stand
on every edge, and in lives that Hypothesis makes up.
"""

from collections.abc import Iterator

import pytest
from hypothesis import Phase

from conftest import LONG
from lifecycle import ERAS, TOURS, Stage, explore, tour

EXAMPLES, STEPS = (13, 60) if LONG else (2, 30)
TOURED = [
    (name, era) for name, (its_era, _) in TOURS.items() for era in (ERAS if LONG else [its_era])
]


@pytest.fixture(scope="module")
def stage(module_dsn: str) -> Iterator[Stage]:
    stage = Stage(module_dsn)
    yield stage
    stage.close()


@pytest.mark.parametrize(("name", "era"), TOURED)
def test_a_tour_of_all_that_can_happen(stage: Stage, name: str, era: str) -> None:
    tour(stage, name, era)


@pytest.mark.parametrize("era", ERAS)
def test_answers_are_the_oracles(stage: Stage, era: str) -> None:
    seed = list(ERAS).index(era)
    explore(stage, ERAS[era], seed=seed, examples=EXAMPLES, steps=STEPS, phases=Phase)
    print(stage.tally)
