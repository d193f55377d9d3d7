"""What is unsafe or late in a running system, each with its reason and its mend."""

from datetime import datetime
from typing import Any, NamedTuple

import psycopg

from energy_platform import schema
from energy_platform.settings import Settings, check_retention

_REFRESH = "policy_refresh_continuous_aggregate"


class Finding(NamedTuple):
    """One thing that is wrong."""

    subject: str
    problem: str
    mend: str


def examine(
    connection: psycopg.Connection[Any], settings: Settings, now: datetime
) -> list[Finding]:
    """All findings; empty where nothing is wrong. Raises: SetupError for an unusable server."""
    findings = [
        Finding("settings", problem, "change the setting") for problem in check_retention(settings)
    ]
    schema.check_server(connection)
    missing = schema.missing_migrations(connection)
    if missing:
        findings.append(
            Finding("schema", f"lacks {', '.join(sorted(missing))}", "energy-platform migrate")
        )
        return findings
    trusted = schema.fetch_trusted(connection)
    if trusted is None:
        findings.append(
            Finding("TimescaleDB", "was updated and not probed since", "energy-platform migrate")
        )
    elif not trusted:
        findings.append(
            Finding(
                "TimescaleDB",
                "keeps its books in a way we do not know: answers come from raw rows, slowly",
                "use a version that is supported, then energy-platform migrate",
            )
        )
    jobs = schema.fetch_job_status(connection)
    for job in jobs:
        if job.last_ok is False:
            findings.append(Finding(job.title, f"failed: {job.last_error}", "see the log"))
        elif job.last_started is None:
            findings.append(Finding(job.title, "has never run", "energy-platform jobs"))
        elif now - job.last_started > 3 * job.schedule_interval:
            findings.append(
                Finding(job.title, f"last ran {job.last_started:%F %H:%M}Z", "energy-platform jobs")
            )
    held = [job for job in jobs if job.job == "policy_retention" and not job.scheduled]
    if held and not any(found.subject.startswith(_REFRESH) for found in findings):
        findings.append(
            Finding(
                ", ".join(sorted(job.title for job in held)),
                "held back: raw readings that would be dropped are not rolled up",
                "energy-platform jobs",
            )
        )
    return findings
