"""Does the doctor find each planted fault, by name, and does the mend that it gives mend it?

Policies look at the server's own clock, so here the data is laid around it; nothing waits.
"""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from energy_platform import cli, doctor, logs, schema
from energy_platform.errors import SetupError
from energy_platform.settings import Settings

Db = psycopg.Connection[Any]

DEFAULTS = Settings()
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
REFRESH = "policy_refresh_continuous_aggregate"


@pytest.fixture
def now(db: Db) -> datetime:
    """The server's own time."""
    row = db.execute("SELECT now()").fetchone()
    assert row is not None
    at: datetime = row[0]
    return at.astimezone(UTC)


class Patient:
    """A database that is well."""

    def __init__(self, db: Db, dsn: str, now: datetime) -> None:
        self.db = db
        self.dsn = dsn
        self.now = now
        # A clone of a database has not the rights of its template on the database itself.
        db.execute(
            "DO $$ BEGIN EXECUTE format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC',"
            " current_database()); END $$"
        )
        self.record_success()

    def record_success(self) -> None:
        """As if all jobs had run."""
        self.db.execute(
            "INSERT INTO job_run (job_id, job_name, started_at, finished_at, succeeded)"
            " SELECT job_id, job, %(now)s, %(now)s, true FROM job_status",
            {"now": self.now},
        )
        self.db.execute(
            "SELECT alter_job(job_id, scheduled => true) FROM job_status"
            " WHERE job = 'policy_retention'"
        )

    def run_jobs(self, *, run_all: bool = True) -> None:
        runs = schema.run_due_jobs(self.db, lambda: self.now, run_all=run_all)
        assert all(run.succeeded for run in runs)

    def examine(self, settings: Settings = DEFAULTS) -> list[doctor.Finding]:
        return doctor.examine(self.db, settings, self.now)

    def find_one(self, settings: Settings = DEFAULTS) -> doctor.Finding:
        (finding,) = self.examine(settings)
        return finding

    def mend(self, finding: doctor.Finding) -> None:
        """Do what the finding says."""
        mend = finding.mend
        if mend.startswith("in psql: "):
            statement = mend.removeprefix("in psql: ").partition(", or ALTER ")[0]
            if statement.endswith(r" \gexec"):
                row = self.db.execute(statement.removesuffix(r" \gexec")).fetchone()
                assert row is not None
                statement = row[0]
            self.db.execute(statement)
        elif mend.startswith(doctor.MIGRATE):
            schema.migrate(self.dsn, DEFAULTS)
        elif mend.startswith(doctor.JOBS):
            self.run_jobs(run_all=mend.startswith(doctor.ALL_JOBS))
        else:
            pytest.fail(f"no command: {mend}")


@pytest.fixture
def patient(db: Db, dsn: str, now: datetime) -> Patient:
    return Patient(db, dsn, now)


def test_nothing_is_found_where_nothing_is_wrong(patient: Patient) -> None:
    patient.db.execute(
        "INSERT INTO meter_telemetry_history"
        " SELECT 'M-1', ts, 1, 230, ts"
        " FROM generate_series(%(now)s - INTERVAL '5 hours', %(now)s, '1 minute') ts",
        {"now": patient.now},
    )
    patient.db.execute(
        "INSERT INTO meter_live_status VALUES ('M-1', %(now)s, 1, 230, %(now)s)",
        {"now": patient.now},
    )
    patient.db.execute("INSERT INTO vehicle (vehicle_id) VALUES ('V-never-heard')")
    patient.db.execute("DELETE FROM job_run")
    schema.migrate(patient.dsn, DEFAULTS)
    patient.run_jobs()
    assert patient.examine() == []
    # Nor a little later, or after another migrate.
    schema.migrate(patient.dsn, DEFAULTS)
    patient.now += 9 * MINUTE
    assert patient.examine() == []


# ---- The schema ---------------------------------------------------------------------------------

# What is done by hand, and what the doctor then says of which object.
DRIFT = [
    ("CREATE OR REPLACE FUNCTION oldest_cut() RETURNS timestamptz LANGUAGE sql AS 'SELECT now()'",
     "function oldest_cut()", "was changed"),
    ("DROP FUNCTION vehicle_performance_v1(text, timestamptz, timestamptz)",
     "function vehicle_performance_v1(text, timestamp with time zone, timestamp with time zone)",
     "is missing"),
    ("CREATE OR REPLACE FUNCTION register_step(value float8, previous float8) RETURNS float8"
     " LANGUAGE sql IMMUTABLE AS 'SELECT 1.0'",
     "function register_step(double precision, double precision)", "was changed"),
    ("ALTER PROCEDURE sweep_expired SECURITY DEFINER",
     "procedure sweep_expired(integer, jsonb)", "was changed"),
    ("CREATE FUNCTION stray(a text) RETURNS text LANGUAGE sql AS 'SELECT a';"
     "REVOKE EXECUTE ON FUNCTION stray FROM PUBLIC", "function stray(text)", "is unknown"),
    ("DROP VIEW vehicle_energy_daily_v1", "view vehicle_energy_daily_v1", "is missing"),
    ("DROP VIEW meter_hourly_materialized", "view meter_hourly_materialized", "is missing"),
    ("CREATE OR REPLACE VIEW meter_daily_materialized AS"
     " SELECT * FROM _timescaledb_internal._materialized_hypertable_5 WHERE false",
     "view meter_daily_materialized", "was changed"),
    ("CREATE VIEW stray AS SELECT 1 AS one", "view stray", "is unknown"),
    ("CREATE TABLE stray (id bigint PRIMARY KEY)", "table stray", "is unknown"),
    ("CREATE TYPE stray AS (id bigint)", "type stray", "is unknown"),
    ("ALTER MATERIALIZED VIEW meter_hourly SET (timescaledb.materialized_only = true)",
     "continuous aggregate meter_hourly", "was changed"),
    ("ALTER TABLE meter_telemetry_history ADD COLUMN phase text",
     "column meter_telemetry_history.phase", "is unknown"),
    ("ALTER TABLE quarantine DROP COLUMN key_id", "column quarantine.key_id", "is missing"),
    ("ALTER TABLE meter ALTER COLUMN registered_at DROP NOT NULL,"
     " ALTER COLUMN registered_at DROP DEFAULT",
     "column meter.registered_at",
     "is timestamp with time zone, was timestamp with time zone NOT NULL DEFAULT now()"),
    ("ALTER TABLE quarantine ALTER COLUMN payload_bytes TYPE integer",
     "column quarantine.payload_bytes", "is integer NOT NULL, was bigint NOT NULL"),
    ("ALTER TABLE charging_assignment DROP CONSTRAINT one_vehicle_at_a_meter",
     "constraint charging_assignment.one_vehicle_at_a_meter", "is missing"),
    ("ALTER TABLE quarantine DROP CONSTRAINT quarantine_payload_check,"
     " ADD CONSTRAINT quarantine_payload_check CHECK (length(payload) < 9)",
     "constraint quarantine.quarantine_payload_check", "was changed"),
    ("ALTER TABLE meter ADD CONSTRAINT few CHECK (meter_id < 'N')",
     "constraint meter.few", "is unknown"),
    ("ALTER TABLE meter_live_status SET UNLOGGED", "table meter_live_status", "was changed"),
    ("DROP INDEX quarantine_code_idx", "index quarantine.quarantine_code_idx", "is missing"),
    ("DROP INDEX quarantine_code_idx; CREATE INDEX quarantine_code_idx ON quarantine (code)",
     "index quarantine.quarantine_code_idx", "was changed"),
    ("CREATE INDEX stray ON meter_telemetry_history (received_at)",
     "index meter_telemetry_history.stray", "is unknown"),
    ("CREATE TRIGGER stray BEFORE UPDATE ON meter FOR EACH ROW"
     " EXECUTE FUNCTION suppress_redundant_updates_trigger()",
     "trigger meter.stray", "is unknown"),
    ("COMMENT ON COLUMN meter.meter_id IS 'mine'", "comment column meter.meter_id", "was changed"),
    ("COMMENT ON TABLE meter IS NULL", "comment table meter", "is missing"),
    ("REVOKE SELECT ON meter_hourly FROM energy_reader",
     "grant SELECT ON public.meter_hourly TO energy_reader", "is missing"),
]  # fmt: skip


def test_what_was_changed_by_hand_is_named_and_mended(
    patient: Patient, subtests: pytest.Subtests
) -> None:
    for change, subject, problem in DRIFT:
        with subtests.test(change):
            patient.db.execute(change)
            found = patient.examine()
            named = [(one.subject, one.problem) for one in found if one.part == "Schema"]
            assert named == [(subject, problem)]
            for _ in range(2):  # a part that was lost had parts of its own
                for finding in found:
                    if finding.part == "Schema":
                        patient.mend(finding)
                found = patient.examine()
                if not found:
                    break
            assert found == []


def test_a_migrate_makes_nothing_right_that_it_did_not_mend(patient: Patient) -> None:
    patient.db.execute("DROP INDEX quarantine_code_idx")
    patient.db.execute("ALTER TABLE meter ADD COLUMN place text")
    patient.db.execute("DROP VIEW vehicle_energy_daily_v1")
    for _ in range(2):
        schema.migrate(patient.dsn, DEFAULTS)
        assert {finding.subject for finding in patient.examine()} == {
            "index quarantine.quarantine_code_idx",
            "column meter.place",
        }


def test_a_view_that_cannot_be_replaced_is_dropped_first(patient: Patient) -> None:
    name = "meter_energy_daily_v1"
    row = patient.db.execute("SELECT pg_get_viewdef(%s::regclass)", (name,)).fetchone()
    assert row is not None
    patient.db.execute(
        f"CREATE OR REPLACE VIEW {name} AS SELECT *, 1 AS more FROM ({row[0].rstrip(';')}) v"
    )
    finding = patient.find_one()
    assert (finding.subject, finding.problem) == (f"view {name}", "was changed")
    with pytest.raises(psycopg.errors.InvalidTableDefinition):
        patient.mend(finding)
    assert finding.mend.endswith(f"; where that fails, DROP VIEW public.{name} first")
    patient.db.execute(f"DROP VIEW public.{name}")
    schema.migrate(patient.dsn, DEFAULTS)
    assert patient.examine() == []


def test_a_missing_aggregate_is_named_and_the_rest_is_examined(patient: Patient) -> None:
    patient.db.execute("DROP MATERIALIZED VIEW vehicle_daily CASCADE")
    found = {finding.subject: finding for finding in patient.examine()}
    assert found["continuous aggregate vehicle_daily"].problem == "is missing"
    assert found["view vehicle_energy_daily_v1"].problem == "is missing"
    assert found[f"{REFRESH} vehicle_daily"].problem == "is missing"


def test_what_the_doctor_looks_through_may_be_missing_itself(patient: Patient) -> None:
    patient.db.execute("DROP VIEW job_status")
    found = {(finding.part, finding.subject): finding for finding in patient.examine()}
    assert found.keys() == {
        ("Schema", "view job_status"), ("Policies", "all of it"), ("Jobs", "all of it"),
    }  # fmt: skip
    assert 'relation "job_status" does not exist' in found["Jobs", "all of it"].problem
    patient.mend(found["Schema", "view job_status"])
    assert patient.examine() == []


def test_migrations_that_are_missing_are_named(patient: Patient) -> None:
    patient.db.execute("DELETE FROM _yoyo_migration WHERE migration_id LIKE '0002%'")
    finding = patient.find_one()
    assert (finding.part, finding.problem) == ("Schema", "lacks 0002_fleet")
    assert finding.mend == doctor.MIGRATE


def test_a_release_that_changed_only_sql_is_seen(
    patient: Patient,
    api: httpx.Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(logs, "set_up_logs", lambda *_: None)  # it would outlive this test
    newest = schema._schema_folder()
    release = tmp_path / "release"
    for folder in ("migrations", "sql"):
        shutil.copytree(newest / folder, release / folder)
    with (release / "sql" / "40_energy.sql").open("a") as file:
        file.write("COMMENT ON VIEW meter_energy_daily_v1 IS 'Anew.';\n")
    with monkeypatch.context() as patch:
        patch.setattr(schema, "_schema_folder", lambda: release)
        answer = api.get("/health/ready")
        assert (answer.status_code, answer.json()["checks"]["schema"]) == (
            503, "needs migrate: sql/ of this release",
        )  # fmt: skip
        assert cli.main(["serve", "--database-url", patient.dsn]) == 2
        assert "has not seen the sql/ of this release" in capsys.readouterr().err
        finding = patient.find_one()
        assert finding.problem == "the database was migrated by another release than this one"
        patient.mend(finding)
        assert patient.examine() == []
        assert api.get("/health/ready").status_code == 200
    # A service of the release before goes on; its doctor says who was here.
    assert api.get("/health/ready").status_code == 200
    assert patient.find_one().subject == "sql/"
    patient.mend(patient.find_one())
    assert patient.examine() == []

    # A migrate that is cut off in the middle is not held against what it left.
    with monkeypatch.context() as patch:
        patch.setattr(schema, "_schema_folder", lambda: release)
        (release / "sql" / "41_new.sql").write_text("CREATE OR REPLACE VIEW news AS SELECT 1 AS n;")
        (release / "sql" / "42_wrong.sql").write_text("SELECT 1 / 0;")
        with pytest.raises(psycopg.errors.DivisionByZero):
            schema.migrate(patient.dsn, DEFAULTS)
        assert api.get("/health/ready").status_code == 503
        assert patient.find_one().problem == "was cut off before its end"
        (release / "sql" / "42_wrong.sql").unlink()
        schema.migrate(patient.dsn, DEFAULTS)
        assert patient.examine() == []


def test_what_another_version_of_the_server_printed_is_not_compared(patient: Patient) -> None:
    patient.db.execute("UPDATE schema_release SET printed_by = '14 2.9.3'")
    patient.db.execute("UPDATE schema_fingerprint SET definition = ' ' || definition")
    finding = patient.find_one()
    assert finding.subject == "definitions"
    patient.mend(finding)
    assert patient.examine() == []


# ---- The server ---------------------------------------------------------------------------------


def test_a_server_that_will_not_do_is_a_finding(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Db) -> None:
        raise SetupError("TimescaleDB 2.9.3 is too old: 2.23 or newer is needed.")

    monkeypatch.setattr(schema, "check_server", refuse)
    finding = patient.find_one()
    assert (finding.part, finding.severity) == ("Server", "fault")
    assert "2.9.3 is too old" in finding.problem


def test_a_server_newer_than_what_was_tried_is_a_remark(
    patient: Patient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(schema, "POSTGRES_TRIED", 14)
    monkeypatch.setattr(schema, "TIMESCALEDB_TRIED", (2, 22))
    found = patient.examine()
    assert [(one.subject, one.severity) for one in found] == [
        ("PostgreSQL", "remark"),
        ("TimescaleDB", "remark"),
    ]
    assert "is newer than what was tried, 2.22" in found[1].problem
    assert cli.main(["doctor", "--database-url", patient.dsn]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Server\n  * PostgreSQL: ")
    assert shown.endswith("\nNothing is wrong.\n")


# ---- Grants -------------------------------------------------------------------------------------

# Rights that are too wide; whose they then are, and what the doctor says of them.
WIDE = [
    ("GRANT UPDATE, DELETE ON meter_telemetry_history TO energy_ingest",
     "energy_ingest", "may DELETE, UPDATE on public.meter_telemetry_history"),
    ("GRANT TRUNCATE ON vehicle_telemetry_history TO energy_reader",
     "energy_reader", "may TRUNCATE on public.vehicle_telemetry_history"),
    ("GRANT SELECT ON api_key TO PUBLIC", "PUBLIC", "may SELECT on public.api_key"),
    ("GRANT SELECT (key_id, name) ON api_key TO energy_reader",
     "energy_reader", "may SELECT (key_id), SELECT (name) on public.api_key"),
    ("GRANT USAGE ON SEQUENCE job_run_job_run_id_seq TO energy_ingest",
     "energy_ingest", "may USAGE on SEQUENCE public.job_run_job_run_id_seq"),
    ("GRANT EXECUTE ON PROCEDURE sweep_expired TO PUBLIC",
     "PUBLIC", "may EXECUTE on ROUTINE public.sweep_expired(integer, jsonb)"),
    ("GRANT EXECUTE ON FUNCTION oldest_cut TO energy_reader",
     "energy_reader", "may EXECUTE on ROUTINE public.oldest_cut()"),
    ("GRANT CREATE ON SCHEMA public TO PUBLIC", "PUBLIC", "may CREATE on SCHEMA public"),
    ("ALTER ROLE energy_ingest SUPERUSER", "energy_ingest", "is SUPERUSER"),
    ("ALTER ROLE energy_reader CREATEDB", "energy_reader", "is CREATEDB"),
    ("ALTER ROLE energy_reader CREATEROLE", "energy_reader", "is CREATEROLE"),
    ("ALTER ROLE energy_reader BYPASSRLS", "energy_reader", "is BYPASSRLS"),
    ("GRANT pg_write_all_data TO energy_ingest",
     "energy_ingest", "is a member of pg_write_all_data"),
]  # fmt: skip


def test_rights_that_are_too_wide_are_named_and_taken_back(
    patient: Patient, subtests: pytest.Subtests
) -> None:
    for grant, role, problem in WIDE:
        # Roles are the whole cluster's: what is planted here is seen by nobody else.
        with subtests.test(grant), patient.db.transaction(force_rollback=True):
            patient.db.execute(grant)
            finding = patient.find_one()
            assert (finding.part, finding.subject, finding.problem) == ("Grants", role, problem)
            patient.mend(finding)
            assert patient.examine() == []


def test_a_right_to_pass_rights_on_is_taken_back(patient: Patient) -> None:
    patient.db.execute("GRANT SELECT ON meter_hourly TO energy_reader WITH GRANT OPTION")
    finding = patient.find_one()
    assert (finding.subject, finding.problem) == (
        "grant SELECT ON public.meter_hourly TO energy_reader",
        "was changed",
    )
    patient.mend(finding)
    assert patient.examine() == []


def test_everything_for_everyone_is_told_in_short(
    patient: Patient, capsys: pytest.CaptureFixture[str]
) -> None:
    patient.db.execute("GRANT ALL ON ALL ROUTINES IN SCHEMA public TO PUBLIC")
    found = patient.examine()
    assert len(found) > 25
    assert cli.main(["doctor", "--database-url", patient.dsn]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 43
    assert shown[-2:] == [f"  and {len(found) - 20} more", f"{len(found)} found."]
    schema.migrate(patient.dsn, DEFAULTS)  # which takes back what is granted on routines
    assert patient.examine() == []


# ---- Policies and jobs --------------------------------------------------------------------------


def job_id(db: Db, title: str) -> int:
    job, _, relation = title.partition(" ")
    row = db.execute(
        "SELECT job_id FROM job_status WHERE job = %s AND relation IS NOT DISTINCT FROM %s",
        (job, relation or None),
    ).fetchone()
    assert row is not None
    return int(row[0])


TITLES = [
    title
    for class_ in ("meter", "vehicle")
    for title in (
        f"{REFRESH} {class_}_hourly",
        f"{REFRESH} {class_}_daily",
        f"policy_compression {class_}_telemetry_history",
        f"policy_retention {class_}_telemetry_history",
        f"policy_retention {class_}_hourly",
    )
] + ["hold_retention", "sweep_expired"]


def test_each_policy_is_missed(patient: Patient) -> None:
    for title in TITLES:
        patient.db.execute("SELECT delete_job(%s)", (job_id(patient.db, title),))
    found = patient.examine()
    assert [(one.part, one.subject, one.problem) for one in found] == [
        ("Policies", title, "is missing") for title in sorted(TITLES)
    ]
    patient.mend(found[0])
    patient.record_success()  # one that was made again has not run yet
    assert patient.examine() == []


def test_each_job_that_is_switched_off_is_named(
    patient: Patient, subtests: pytest.Subtests
) -> None:
    for title in TITLES:
        if title.startswith("policy_retention"):
            continue  # hold_retention is who switches these
        with subtests.test(title):
            patient.db.execute(
                "SELECT alter_job(%s, scheduled => false)", (job_id(patient.db, title),)
            )
            finding = patient.find_one()
            assert (finding.subject, finding.problem) == (title, "is switched off")
            patient.mend(finding)
            assert patient.examine() == []


def set_config(db: Db, title: str, **config: str | None) -> None:
    number = job_id(db, title)
    db.execute(
        "SELECT alter_job(job_id, config => config || %s::jsonb)"
        " FROM timescaledb_information.jobs WHERE job_id = %s",
        (json.dumps(config), number),
    )


# What a policy is made to be, of which title, and what is wrong with that.
ALTERED: list[tuple[str, dict[str, str | None], str, str]] = [
    ("policy_retention meter_telemetry_history", {"drop_after": "30 days"},
     "policy_retention meter_telemetry_history",
     "drops raw readings after 30 d, but the refresh of meter_hourly reaches 390 d back and a "
     "chunk is 1 d: it would erase what is rolled up"),
    ("policy_retention vehicle_hourly", {"drop_after": "392 days"},
     "policy_retention vehicle_hourly",
     "drops hours after 392 d, but the refresh of vehicle_daily reaches 392 d back: it would erase "
     "days"),
    ("policy_retention vehicle_hourly", {"drop_after": "396 days"},
     "policy_retention vehicle_hourly",
     "drops hours after 396 d, raw readings after 400 d: nothing that can be cut by the hour would "
     "be left"),
    (f"{REFRESH} meter_hourly", {"start_offset": None},
     "policy_retention meter_telemetry_history",
     "drops raw readings after 400 d, but the refresh of meter_hourly reaches 365000 d back"),
    (f"{REFRESH} meter_daily", {"start_offset": "9999 days"},
     "policy_retention meter_hourly",
     "drops hours after 1095 d, but the refresh of meter_daily reaches 9999 d back"),
    (f"{REFRESH} vehicle_hourly", {"start_offset": "10 days"},
     f"{REFRESH} vehicle_hourly",
     "reaches 10 d back, but readings may be 380 d late: those would never be rolled up"),
    ("policy_compression meter_telemetry_history", {"compress_after": "30 days"},
     "policy_compression meter_telemetry_history",
     "compress_after is 30 days, by the settings 3 days"),
    ("sweep_expired", {"drop_after": "1 day"},
     "sweep_expired", "drop_after is 1 day, by the settings 30 days"),
]  # fmt: skip


def test_policies_that_lose_data_or_differ_are_named(
    patient: Patient, subtests: pytest.Subtests
) -> None:
    for title, config, subject, problem in ALTERED:
        with subtests.test(f"{title} {config}"):
            set_config(patient.db, title, **config)
            found = {finding.subject: finding for finding in patient.examine()}
            assert found[subject].problem.startswith(problem)
            assert found.keys() <= {subject, title}
            patient.mend(found[subject])
            patient.record_success()
            assert patient.examine() == []


def test_schedules_and_chunks_that_differ_are_named(patient: Patient) -> None:
    title = f"{REFRESH} meter_hourly"
    number = job_id(patient.db, title)
    patient.db.execute("SELECT alter_job(%s, schedule_interval => INTERVAL '5 min')", (number,))
    patient.db.execute("SELECT set_chunk_time_interval('meter_telemetry_history', INTERVAL '7 d')")
    assert {finding.subject: finding.problem for finding in patient.examine()} == {
        title: "runs every 5 min, by the settings 1 h",
        "meter_telemetry_history": "chunks are 7 d wide, by the settings 1 d",
    }
    schema.migrate(patient.dsn, DEFAULTS)
    patient.record_success()
    assert patient.examine() == []
    # With other settings than the service has, the doctor says so too.
    found = patient.examine(Settings(columnstore_after=DAY))
    assert {finding.subject for finding in found} == {
        "policy_compression meter_telemetry_history",
        "policy_compression vehicle_telemetry_history",
    }
    assert "raw_retention must be" in patient.examine(Settings(raw_retention=DAY))[0].problem


def test_a_policy_that_is_none_of_ours_is_named(patient: Patient) -> None:
    patient.db.execute("SELECT add_retention_policy('meter_daily', INTERVAL '90 days')")
    found = patient.examine()
    assert {finding.subject for finding in found} == {"policy_retention meter_daily"}
    assert "is none of ours: {'drop_after': '90 days'}" in found[0].problem
    patient.mend(found[0])
    assert patient.examine() == []


def test_jobs_that_never_ran_failed_or_are_late_are_named(patient: Patient) -> None:
    patient.db.execute("DELETE FROM job_run")
    finding = patient.find_one()
    assert (finding.subject, finding.problem) == ("no job", "has ever run")
    patient.mend(finding)
    assert patient.examine() == []

    patient.db.execute("DELETE FROM job_run WHERE job_name = 'sweep_expired'")
    finding = patient.find_one()
    assert (finding.subject, finding.problem) == ("sweep_expired", "has never run")
    patient.mend(finding)
    assert patient.examine() == []

    patient.db.execute(
        "UPDATE job_run SET started_at = started_at - INTERVAL '50 minutes'"
        " WHERE job_name = 'hold_retention'"
    )
    finding = patient.find_one()
    assert finding.subject == "hold_retention"
    ran = patient.now - 50 * MINUTE
    assert finding.problem == f"last ran {ran:%F %H:%M}Z, 50 min ago; it is due every 15 min"
    patient.mend(finding)
    assert patient.examine() == []

    patient.db.execute(
        "UPDATE job_run SET succeeded = false, error = 'disk full' WHERE job_run_id ="
        " (SELECT max(job_run_id) FROM job_run WHERE job_name = 'hold_retention')"
    )
    finding = patient.find_one()
    assert finding.subject == "hold_retention"
    assert finding.problem == f"failed at {patient.now:%F %H:%M}Z: disk full"
    assert finding.mend == f"mend that, then {doctor.ALL_JOBS}"
    patient.run_jobs()
    assert patient.examine() == []


def test_retention_that_is_held_says_why(patient: Patient) -> None:
    patient.db.execute(
        "SELECT alter_job(job_id, scheduled => false) FROM job_status"
        " WHERE job = 'policy_retention'"
    )
    finding = patient.find_one()
    assert finding.subject.count("policy_retention") == 4
    assert finding.problem == "held back: hold_retention has not let go of them yet"
    patient.db.execute(
        "INSERT INTO meter_telemetry_history"
        " SELECT 'M-1', date_trunc('hour', %(now)s - INTERVAL '410 days')"
        "                + i * INTERVAL '1 minute', 1, 230, %(now)s"
        " FROM generate_series(1, 7) i",
        {"now": patient.now},
    )
    found = [finding for finding in patient.examine() if finding.part == "Jobs"]
    assert [finding.problem for finding in found] == [
        "held back: what would be dropped is not rolled up (1 device hours)"
    ]
    patient.mend(found[0])
    assert patient.examine() == []


# ---- Rollups and storage ------------------------------------------------------------------------


def test_a_watermark_that_is_ahead_is_named_and_drawn_back(patient: Patient) -> None:
    patient.db.execute(
        "INSERT INTO meter_telemetry_history"
        " SELECT 'M-1', %(now)s - i * INTERVAL '10 minutes', 1, 230, %(now)s"
        " FROM generate_series(0, 300) i",
        {"now": patient.now},
    )
    patient.run_jobs()
    assert patient.examine() == []
    for rollup, bucket in (("meter_hourly", HOUR), ("meter_daily", DAY)):
        patient.db.execute(
            f"CALL refresh_continuous_aggregate('{rollup}', %s, %s)",
            (patient.now - 3 * DAY, patient.now + 3 * DAY),
        )
        finding = patient.find_one()
        until = datetime.fromtimestamp(patient.now.timestamp() // bucket.total_seconds()
                                       * bucket.total_seconds(), UTC) + bucket  # fmt: skip
        assert (finding.part, finding.subject) == ("Rollups", rollup)
        assert finding.problem.startswith(f"counts as rolled up until {until:%F %H:%M:%S}+00, ")
        before = patient.db.execute(f"SELECT * FROM {rollup} ORDER BY 1, 2").fetchall()
        patient.mend(finding)
        assert patient.examine() == []
        assert patient.db.execute(f"SELECT * FROM {rollup} ORDER BY 1, 2").fetchall() == before


def test_chunks_that_are_still_rows_are_counted(patient: Patient) -> None:
    oldest = patient.now - 9 * DAY
    patient.db.execute(
        "INSERT INTO vehicle_telemetry_history"
        " SELECT 'V-1', %(now)s - i * INTERVAL '1 day', 50, 1, 20, %(now)s"
        " FROM generate_series(0, 9) i",
        {"now": patient.now},
    )
    # Chunks of the last three days and a half are not due.
    due = sum((patient.now - i * DAY).date() < (patient.now - 3.5 * DAY).date() for i in range(10))
    finding = patient.find_one()
    assert (finding.part, finding.subject) == ("Storage", "vehicle_telemetry_history")
    assert finding.problem == (
        f"{due} chunks are not compressed though older than 3 d, the oldest of {oldest:%F}"
    )
    patient.mend(finding)
    assert patient.examine() == []


# ---- Fleet --------------------------------------------------------------------------------------

Hear = Callable[..., None]


@pytest.fixture
def hear(patient: Patient) -> Hear:
    """A device is heard: by its own clock `behind`, `readings` times, the last of them `ago`."""

    def hear(
        device_id: str,
        *,
        behind: timedelta = timedelta(0),
        ago: timedelta = timedelta(0),
        readings: int = 5,
        at_once: bool = False,
        interval: timedelta = MINUTE,
    ) -> None:
        class_, values = ("meter", "1, 230") if device_id[0] == "M" else ("vehicle", "50, 1, 20")
        last = patient.now - ago
        patient.db.execute(
            f"INSERT INTO {class_} ({class_}_id, reporting_interval) VALUES (%s, %s)",
            (device_id, interval),
        )
        for number in reversed(range(readings)):
            received_at = last if at_once else last - number * interval
            row = (device_id, last - number * interval - behind, received_at)
            patient.db.execute(
                f"INSERT INTO {class_}_telemetry_history VALUES (%s, %s, {values}, %s)", row
            )
        patient.db.execute(f"INSERT INTO {class_}_live_status VALUES (%s, %s, {values}, %s)", row)

    return hear


def fleet(patient: Patient) -> list[tuple[str, str, str]]:
    return [
        (finding.subject, finding.problem, finding.severity)
        for finding in patient.examine()
        if finding.part == "Fleet"
    ]


def test_clocks_in_local_time_are_told_from_late_readings(patient: Patient, hear: Hear) -> None:
    hear("M-right")
    hear("M-backlog", behind=HOUR, at_once=True, readings=60)  # sent at once, an hour late
    hear("M-once", behind=HOUR, readings=1)  # may be chance
    hear("M-minutes", behind=80 * MINUTE)
    hear("M-far", behind=20 * HOUR)
    assert fleet(patient) == []
    hear("M-5", behind=5 * HOUR + 90 * timedelta(seconds=1))
    assert fleet(patient) == [("1 device", "behind by whole hours: M-5 by 5 h", "fault")]
    for number in range(6):
        hear(f"V-{number}", behind=HOUR - MINUTE)
    assert fleet(patient) == [
        ("7 devices", "behind by whole hours: M-5 by 5 h, V-0 by 1 h, V-1 by 1 h, V-2 by 1 h, "
         "V-3 by 1 h and 2 more", "fault"),
    ]  # fmt: skip


def test_clocks_that_are_ahead_are_told_from_quarantine(
    patient: Patient, clock: Any, api: httpx.Client
) -> None:
    clock.now = patient.now

    def post(device_id: str, ahead: timedelta, note: str = "") -> None:
        ts = (clock.now + ahead).isoformat()
        reading = {"meterId": device_id, "kwhConsumedAc": 1, "voltage": 230, "timestamp": ts}
        reading |= {"note": note}
        assert api.post("/v1/ingest", json=reading).json()["code"] == "in_future"

    post("M-old", HOUR)
    patient.now += 25 * HOUR
    patient.record_success()
    assert fleet(patient) == []
    clock.now = patient.now
    for minutes in range(3):
        post("M-1", HOUR + minutes * MINUTE)
        clock.advance(minutes=1)
    post("M-2", 9 * HOUR)
    post("M-3", HOUR, note="n" * 5_000)  # too long to be looked into
    (found,) = fleet(patient)
    assert found == (
        "3 devices",
        "refused as in_future within a day, ahead: M-2 by 9 h (1 reading), M-1 by 1 h (3 readings),"
        " M-3 (1 reading)",
        "fault",
    )


def test_devices_that_went_silent_are_named_the_longest_first(patient: Patient, hear: Hear) -> None:
    patient.db.execute("INSERT INTO meter (meter_id) VALUES ('M-never-heard')")
    hear("M-now")
    hear("M-10", ago=10 * MINUTE)
    hear("M-slow", ago=40 * MINUTE, interval=15 * MINUTE)
    assert fleet(patient) == []
    hear("M-11", ago=11 * MINUTE)
    hear("M-slower", ago=46 * MINUTE, interval=15 * MINUTE)
    assert fleet(patient) == [
        ("2 of 5 meters", "silent: M-slower for 46 min, M-11 for 11 min", "fault")
    ]
    for number in range(6):
        hear(f"V-{number}", ago=timedelta(days=number + 1))
    assert fleet(patient)[1] == (
        "6 of 6 vehicles",
        "silent: V-5 for 6 d, V-4 for 5 d, V-3 for 4 d, V-2 for 3 d, V-1 for 2 d and 1 more",
        "fault",
    )


def test_devices_that_are_silent_for_a_month_are_retired(
    patient: Patient, hear: Hear, capsys: pytest.CaptureFixture[str]
) -> None:
    hear("M-gone", ago=31 * DAY, readings=1)
    hear("M-imported", behind=900 * DAY, ago=HOUR, readings=1)
    hear("M-here")
    patient.run_jobs()  # which compress what is old
    assert fleet(patient) == [
        ("2 of 3 meters", "silent for over 30 days, so taken for retired", "remark")
    ]
    assert cli.main(["doctor", "--database-url", patient.dsn]) == 0
    assert "Nothing is wrong." in capsys.readouterr().out
