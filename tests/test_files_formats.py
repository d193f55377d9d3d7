"""What does a line of a file say? No database here: what becomes of it is asked elsewhere."""

import gzip
import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from conftest import NOON
from energy_platform.errors import Rejection, SetupError
from energy_platform.files import ImportOptions, decode_fill, open_source
from energy_platform.files.formats import LocalClock, create_format

PARIS = "Europe/Paris"
DAY = timedelta(days=1)
OWN_LINE = (
    b'{"meterId":"M-1","kwhConsumedAc":0.1,"voltage":230.5,"timestamp":"2026-02-10T00:00:00Z"}\n'
)
HOUSEHOLD_HEADER = (
    b"Date;Time;Global_active_power;Global_reactive_power;Voltage;Global_intensity;"
    b"Sub_metering_1;Sub_metering_2;Sub_metering_3"
)


@pytest.mark.parametrize(
    ("first", "given", "line", "expected"),
    [
        (OWN_LINE, {"fill": {"voltage": 1.0}}, b'{"meterId":"M","soc":1}',
         {"meterId": "M", "soc": 1, "voltage": 1}),
        (b"meterId,timestamp,voltage,note,voltage", {}, b' M , t ,"1.50",x,2',
         {"meterId": "M", "timestamp": "t", "voltage": 1.5}),
        (HOUSEHOLD_HEADER, {"meter": "M", "time_zone": PARIS},
         b"16/12/2006;17:24:00;4.5;0;234.84;18;0;1;17",
         {"meterId": "M", "kwhConsumedAc": 0.075, "voltage": 234.84,
          "timestamp": "2006-12-16T16:24:00Z"}),
        (HOUSEHOLD_HEADER, {"meter": "M", "time_zone": PARIS}, b"31/2/2006;17:24:00;?;?;?;?;?;?;",
         {"meterId": "M", "timestamp": "31/2/2006 17:24:00"}),
        (b"datetime,soc,charged_energy", {"vehicle": "V", "fill": {"batteryTemp": 20.0}},
         b"2023-05-16 07:00:00Z,55,1500",
         {"vehicleId": "V", "soc": 55, "kwhDeliveredDc": 1.5, "timestamp": "2023-05-16T07:00:00Z",
          "batteryTemp": 20}),
    ],
    ids=["lines", "table", "household", "household-nothing", "charger"],
)  # fmt: skip
def test_a_line_is_the_fields_of_a_reading(
    first: bytes, given: dict[str, Any], line: bytes, expected: dict[str, Any]
) -> None:
    known = create_format("file", first, ImportOptions(late_window=DAY, **given))
    text = known.read(line)
    assert isinstance(text, bytes)
    assert json.loads(text) == expected


@pytest.mark.parametrize(
    ("zone", "local", "expected"),
    [
        # A line that comes twice in the repeated hour stays where it is.
        (PARIS, ["2007-10-28T02:30", "2007-10-28T02:30"], ["00:30", "00:30"]),
        (PARIS, ["2007-10-28T02:59", "2007-10-28T02:00"], ["00:59", "01:00"]),
        # A file that begins in it: the first of the two.
        (PARIS, ["2007-10-28T02:10"], ["00:10"]),
        # Gaps do not matter, as long as the order does not contradict.
        (PARIS, ["2007-10-28T01:10", "2007-10-28T02:50", "2007-10-28T02:05"],
         ["23:10", "00:50", "01:05"]),
        (PARIS, ["2007-10-28T03:00", "2007-10-28T02:30"], ["02:00", "ambiguous_time"]),
        (PARIS, ["2007-03-25T01:59", "2007-03-25T02:00", "2007-03-25T03:00"],
         ["00:59", "nonexistent_time", "01:00"]),
        # Clocks that change by half an hour.
        ("Australia/Lord_Howe", ["2026-04-05T01:45", "2026-04-05T01:45"], ["14:45", "14:45"]),
        ("Australia/Lord_Howe", ["2026-04-05T01:59", "2026-04-05T01:30"], ["14:59", "15:00"]),
        ("Asia/Kolkata", ["2026-04-05T01:59"], ["20:29"]),
        (PARIS, ["0001-01-01T00:00"], ["bad_timestamp"]),
    ],
)  # fmt: skip
def test_local_times_find_their_place(zone: str, local: list[str], expected: list[str]) -> None:
    clock = LocalClock(zone)
    placed = [clock.place(datetime.fromisoformat(text)) for text in local]
    assert [p.code if isinstance(p, Rejection) else f"{p:%H:%M}" for p in placed] == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("batterytemp=20", "did you mean batteryTemp"),
        ("voltage", "no number"),
        ("soc=nan", "no num"),
    ],
)
def test_set_says_what_is_wrong_with_it(text: str, complaint: str) -> None:
    with pytest.raises(SetupError, match=complaint):
        decode_fill([text])


@pytest.mark.parametrize(
    ("content", "given", "complaint"),
    [
        (b"", {}, "holds no line"),
        (b"\n \n", {}, "holds no line"),
        (b"a,b,c\n1,2,3\n", {}, "in no format"),
        (b"\x89PNG\r\n", {}, "in no format"),
        (b'"a,b\n', {}, "in no format"),
        (gzip.compress(b"x" * 1000, mtime=0)[:20], {}, "holds no line"),
        (OWN_LINE, {"meter": "M-1"}, "names its devices itself"),
        (OWN_LINE, {"time_zone": PARIS}, "--time-zone is not for it"),
        (HOUSEHOLD_HEADER, {"time_zone": PARIS}, "names no meter"),
        (HOUSEHOLD_HEADER, {"meter": "M"}, "in local time"),
        (HOUSEHOLD_HEADER, {"meter": "M", "time_zone": "Paris"}, "no time zone 'Paris'"),
        (HOUSEHOLD_HEADER, {"meter": "M", "time_zone": "../x"}, "no time zone"),
        (HOUSEHOLD_HEADER, {"meter": "M 1"}, "without a space"),
        (OWN_LINE, {"since": NOON, "until": NOON}, "after --since"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_says_so_before_anything_is_done(
    content: bytes, given: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with (
        pytest.raises(SetupError, match=complaint),
        open_source(path, ImportOptions(late_window=DAY, **given)),
    ):
        pass
    with (
        pytest.raises(SetupError, match="cannot be read: No such file"),
        open_source(tmp_path / "absent", ImportOptions(late_window=DAY)),
    ):
        pass
