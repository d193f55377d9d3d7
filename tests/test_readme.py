"""What the README tells a newcomer to type is what works."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from energy_platform.cli import COMMANDS, make_parser
from running import Platform

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]


def _shell_blocks(text: str) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)


def _run(block: str, platform: Platform) -> str:
    """Run a block as it stands, with this platform's address, folder and program."""
    block = block.replace("http://127.0.0.1:8080", platform.url)
    block = block.replace(".venv/bin/energy-platform dsn", f"{_program()} dsn")
    block = block.replace(" dsn --role", f" dsn --data-dir {platform.data_dir} --role")
    finished = subprocess.run(
        ["bash", "-ec", block], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def _program() -> str:
    return f"{sys.executable} -m energy_platform"


def test_first_example_gives_the_figures_that_the_readme_names(platform: Platform) -> None:
    posting, querying = _shell_blocks(README)
    answered = _run(posting, platform)
    assert answered.count('{"outcome":"stored"}') == 2
    for figure in (
        '"totalKwhConsumedAc":14.6',
        '"totalKwhDeliveredDc":11.2',
        '"efficiencyRatio":0.7671232876712328',
        '"averageBatteryTemp":36.0',
        '"verdict":"insufficient_data"',
    ):
        assert figure in answered
    if shutil.which("psql") is None:
        pytest.skip("no psql here: that SQL gives the same figures is proved by test_performance")
    selected = _run(querying, platform)
    rows = dict(
        line.replace(" ", "").split("|") for line in selected.splitlines() if line.count("|") == 1
    )
    assert rows["total_kwh_consumed_ac"] == "14.6"
    assert rows["total_kwh_delivered_dc"] == "11.2"
    assert rows["efficiency_ratio"] == "0.7671232876712328"
    assert rows["average_battery_temp"] == "36"


def test_make_has_the_targets_that_the_readme_names() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    assert {"up", "test"} <= set(re.findall(r"^make ([a-z-]+)", README, re.M))
    assert set(re.findall(r"`?make ([a-z-]+)", README)) <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_of_the_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", document.read_text("utf-8")):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_documented_commands_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(
        r"^energy-platform (.+)$", (ROOT / "docs/operating.md").read_text("utf-8"), re.M
    )
    assert commands
    for command in commands:
        words = subprocess.run(
            ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True
        ).stdout.split("\0")[:-1]
        make_parser().parse_args(words)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_of_every_command_shows_its_settings(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        make_parser().parse_args([command, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: energy-platform" in shown
    if command != "doctor":
        assert "[ENERGY_" in shown
