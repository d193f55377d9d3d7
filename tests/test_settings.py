"""Are settings checked before they can do harm?"""

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from energy_platform import runtime, schema
from energy_platform.access import make_key
from energy_platform.cli import make_parser
from energy_platform.errors import SetupError, UnreachableError
from energy_platform.http.access import is_local_request
from energy_platform.settings import OPTIONS, Settings, check_retention, load_settings


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ENERGY_PROT": "1"}, "no setting ENERGY_PROT"),
        ({"ENERGY_PORT": "x"}, "ENERGY_PORT='x'"),
        ({"ENERGY_PORT": "65536"}, "ENERGY_PORT='65536'"),
        ({"ENERGY_LATE_WINDOW": "5d"}, "ENERGY_LATE_WINDOW='5d'"),
        ({"ENERGY_LATE_WINDOW": "-P1D"}, "not negative"),
        ({"ENERGY_BODY_READINGS_MAX": "5"}, "ENERGY_BODY_READINGS_MAX='5'"),
    ],
)
def test_a_setting_that_cannot_be_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(SetupError, match=message):
        load_settings("up", environment)


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(SetupError) as refused:
        load_settings("up", {"ENERGY_DATA_DIRR": "x"})
    assert refused.value.hint == "did you mean ENERGY_DATA_DIR?"


def test_a_command_ignores_the_settings_of_others() -> None:
    assert load_settings("dsn", {"ENERGY_PORT": "x"}) == Settings()


def test_the_command_line_wins_over_the_environment() -> None:
    settings = load_settings("up", {"ENERGY_PORT": "1", "ENERGY_HOST": "::1"}, {"port": "2"})
    assert (settings.port, settings.host) == (2, "::1")


def test_every_setting_says_what_it_is_and_who_reads_it() -> None:
    for option in OPTIONS:
        assert option.description
        assert option.commands


def test_no_span_is_kept_for_no_time() -> None:
    for name in ("late_window", "quarantine_retention", "refresh_every"):
        assert f"{name} must be over 0" in check_retention(
            load_settings("up", {f"ENERGY_{name.upper()}": "PT0S"})
        )


def test_the_readers_connection_string_does_not_hold_the_owners_password() -> None:
    owner = "postgresql://energy_user:secret@db:5432/energy_db"
    reader = conninfo_to_dict(runtime.find_running(Settings(database_url=owner), "reader"))
    assert reader["user"] == "energy_reader"
    assert reader["host"] == "db"
    assert "password" not in reader


def test_a_mistyped_folder_is_not_made_a_database(tmp_path: object) -> None:
    settings = Settings(data_dir=f"{tmp_path}/nowhere")
    with (
        pytest.raises(UnreachableError, match="no database in"),
        runtime.open_database(settings, may_create=False),
    ):
        pass


@pytest.mark.parametrize("name", [b"x-forwarded-for", b"forwarded", b"via", b"x-real-ip"])
def test_what_came_through_a_proxy_is_not_local(name: bytes) -> None:
    assert is_local_request([(b"host", b"127.0.0.1:8080")])
    assert not is_local_request([(b"host", b"127.0.0.1:8080"), (name, b"203.0.113.9")])


def test_a_key_is_not_bound_to_nothing() -> None:
    with pytest.raises(SetupError, match="binds the key to nothing"):
        make_key("k", ["ingest"], device_prefix="")
    with pytest.raises(SetupError, match="no device id"):
        make_key("k", ["ingest"], device_ids=["a b"])


def test_a_connection_string_that_is_none_is_said_so() -> None:
    from energy_platform.database import connect_now

    with pytest.raises(SetupError, match="no connection string"):
        connect_now("foo", "test")


def test_temporary_tables_do_not_stand_in_front_of_ours(dsn: str) -> None:
    """On the embedded engine a temporary table is there for every session."""
    schema.migrate(dsn, Settings())  # a database's own privileges are not cloned with it
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SET ROLE energy_reader")
        denied = pytest.raises(psycopg.errors.InsufficientPrivilege)
        with denied:
            connection.execute("CREATE TEMPORARY TABLE meter_telemetry_history (id int)")


def test_settings_may_stand_before_and_behind_an_action() -> None:
    for words in (
        ["keys", "--data-dir", "x", "create", "gateway"],
        ["keys", "create", "gateway", "--data-dir", "x"],
    ):
        arguments = make_parser().parse_args(words)
        assert load_settings("keys", {}, vars(arguments)).data_dir == "x"
        assert arguments.name == "gateway"
