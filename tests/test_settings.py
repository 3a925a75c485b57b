"""Settings: what is accepted, what is refused and where, what the environment changes, where paths lead."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.config import ConfigError, check, content_keys, load_settings, provider_secret, sqlite_path
from gateway.domain.content_keys import new_key
from tests.test_catalog import GOOD, provider

CONFIG = Path(__file__).parent.parent / "config"


def write(folder: Path, text: str, name: str = "gateway.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problems(folder: Path, text: str, environ: dict[str, str] | None = None) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load_settings(write(folder, text), environ or {})
    assert str(caught.value).splitlines() == [str(problem) for problem in caught.value.problems]
    return {problem.key: problem.message for problem in caught.value.problems}


def test_an_empty_file_means_all_defaults_with_absolute_paths(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, ""), {})
    assert settings.server.port == 8080 and settings.timeouts.first_token_s == "adaptive"
    assert settings.catalog == (str(tmp_path / "catalog.toml"),)
    assert settings.journal.dir == str(tmp_path / "var/journal")
    assert settings.server.runtime_dir == str(tmp_path / "var/run")
    assert settings.server.tls_cert == ""
    assert sqlite_path(settings) == tmp_path / "var/gateway.db"


def test_absolute_and_upward_paths(tmp_path: Path) -> None:
    text = '[store]\nurl = "sqlite:////srv/g.db"\n[journal]\ndir = "../j"\n[server]\nruntime_dir = "run"'
    settings = load_settings(write(tmp_path, text), {})
    assert sqlite_path(settings) == Path("/srv/g.db")
    assert settings.journal.dir == str(tmp_path.parent / "j")
    assert settings.server.runtime_dir == str(tmp_path / "run")


def test_a_postgresql_store_has_no_file(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, '[store]\nurl = "postgresql://g@db/gateway"'), {})
    assert settings.store.url == "postgresql://g@db/gateway"
    with pytest.raises(ValueError, match="not SQLite"):
        sqlite_path(settings)


def test_seconds_may_be_whole_numbers_and_first_token_a_number(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, "[timeouts]\nidle_s = 5\nfirst_token_s = 7\n[server]\nhang_s = 0"), {})
    assert settings.timeouts.idle_s == 5.0 and isinstance(settings.timeouts.idle_s, float)
    assert settings.timeouts.first_token_s == 7.0 and settings.server.hang_s == 0.0


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        """
colour = "red"
[server]
prot = 1
port = 70000
workers = 65
host = ""
trusted_proxies = ["10.0.0.1/8", "::1", "proxy.local"]
request_body_s = 0
hang_s = nan
body_bytes_max = 0
[journal]
fsync = "sometimes"
[store]
url = "mysql://user:hunter2@db"
[billing]
signup_usd = 5
purchase_fee_percent = "101"
purchase_fee_min_usd = "-1"
[routing]
prometheus_url = "prometheus:9090"
exploration_share = 0.9
""",
    )
    assert set(found) == {
        "colour", "server.prot", "server.port", "server.workers", "server.host", "server.trusted_proxies[0]", "server.trusted_proxies[2]",
        "server.request_body_s", "server.hang_s", "server.body_bytes_max", "journal.fsync", "store.url", "billing.signup_usd",
        "billing.purchase_fee_percent", "billing.purchase_fee_min_usd", "routing.prometheus_url", "routing.exploration_share",
    }  # fmt: skip
    assert found["server.prot"] == "unknown key; did you mean port?"
    assert found["server.port"].endswith("<= 65535, got 70000")
    assert found["journal.fsync"] == "must be one of batch, always, never"
    assert "quotes" in found["billing.signup_usd"]
    assert "hunter2" not in str(found)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("server = 3", "server"),
        ("catalog = []", "catalog"),
        ("catalog = [1]", "catalog[0]"),
        ('[store]\nurl = "sqlite:///"', "store.url"),
        ('[store]\nurl = "sqlite:///a?mode=ro"', "store.url"),
        ('[server]\nport = "8080"', "server.port"),
        ("[server]\nport = true", "server.port"),
        ("[operations]\nport = 8080", "operations.port"),
        ("[journal]\nfsync_ms = 0", "journal.fsync_ms"),
        ('[timeouts]\nfirst_token_s = "fast"', "timeouts.first_token_s"),
        ('[limits]\ncredited_usd = "ten"', "limits.credited_usd"),
        ('[billing]\nsignup_usd = "0.0000000001"', "billing.signup_usd"),
        ('[billing]\nlogging_discount_percent = "1.00001"', "billing.logging_discount_percent"),
        ("[content]\nexchange_bytes_max = 2097153", "content.exchange_bytes_max"),
        ("[routing]\nbreaker_open_s = 90", "routing.breaker_open_s_max"),
        ('[routing]\nhedge_percent = "101"', "routing.hedge_percent"),
        ('[routing]\nhedge_percent = "some"', "routing.hedge_percent"),
    ],
)
def test_a_bad_value_is_refused_by_key(tmp_path: Path, text: str, key: str) -> None:
    assert list(problems(tmp_path, text)) == [key]


def test_tls_files_exist_and_come_in_pairs(tmp_path: Path) -> None:
    assert list(problems(tmp_path, '[server]\ntls_cert = "none.pem"')) == ["server.tls_key", "server.tls_cert"]
    (tmp_path / "cert.pem").touch()
    (tmp_path / "key.pem").touch()
    settings = load_settings(write(tmp_path, '[server]\ntls_cert = "cert.pem"\ntls_key = "key.pem"'), {})
    assert settings.server.tls_key == str(tmp_path / "key.pem")


def test_syntax_errors_name_the_line(tmp_path: Path) -> None:
    assert list(problems(tmp_path, "[server]\nport = = 1")) == ["line 2"]
    assert list(problems(tmp_path, "[server]\nport = 1\nport = 2\n")) == ["line 3"]
    assert "nested" in problems(tmp_path, "a = " + "[" * 20_000)[""]
    (tmp_path / "latin.toml").write_bytes(b'a = "\xff"')
    with pytest.raises(ConfigError, match="not UTF-8 at byte 5"):
        load_settings(tmp_path / "latin.toml", {})
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read: No such file"):
        load_settings(tmp_path / "none.toml", {})


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    environ = {
        "GATEWAY_SERVER__PORT": "9000",
        "GATEWAY_SERVER__HANG_S": "2.5",
        "GATEWAY_SERVER__TRUSTED_PROXIES": "10.0.0.0/8, ::1",
        "GATEWAY_BILLING__CHARGE_BROKEN_STREAMS": "true",
        "GATEWAY_BILLING__SIGNUP_USD": "5",
        "GATEWAY_TIMEOUTS__FIRST_TOKEN_S": "12",
        "GATEWAY_STORE__URL": "sqlite:///other.db",
        "GATEWAY_CATALOG": "a.toml,b/",
        "GATEWAY_PORT": "tcp://10.0.0.1:80",  # Kubernetes' own, for a service named gateway
    }
    settings = load_settings(write(tmp_path, "[server]\nport = 1\nworkers = 3"), environ)
    assert settings.server.port == 9000 and settings.server.workers == 3 and settings.server.hang_s == 2.5
    assert settings.server.trusted_proxies == ("10.0.0.0/8", "::1")
    assert settings.billing.charge_broken_streams is True and settings.billing.signup_usd == "5"
    assert settings.timeouts.first_token_s == 12.0
    assert sqlite_path(settings) == tmp_path / "other.db"
    assert settings.catalog == (str(tmp_path / "a.toml"), str(tmp_path / "b"))


def test_a_bad_variable_is_blamed_and_not_the_file(tmp_path: Path) -> None:
    environ = {"GATEWAY_SERVER__PORT": "-1", "GATEWAY_SERVER__PROT": "1", "GATEWAY_NOTHING__X": "1", "GATEWAY_SERVER__TRUSTED_PROXIES": "x"}
    with pytest.raises(ConfigError) as caught:
        load_settings(write(tmp_path, ""), environ)
    assert {(problem.file, problem.key) for problem in caught.value.problems} == {("environment", name) for name in environ}


def test_check_tells_of_config_and_catalog_together(tmp_path: Path) -> None:
    write(tmp_path, GOOD.replace('"0.00001"', "0.00001"), "catalog.toml")
    found = check(write(tmp_path, "[server]\nport = -1"), {})
    assert [(Path(problem.file).name, problem.key, problem.warning) for problem in found] == [
        ("gateway.toml", "server.port", False),
        ("catalog.toml", "models[0].endpoints[0].pricing.completion", False),
    ]
    write(tmp_path, GOOD, "catalog.toml")
    found = check(write(tmp_path, ""), {})
    assert [(problem.key, problem.warning) for problem in found] == [("providers[0].api_key_env", True)]
    assert check(write(tmp_path, ""), {"NORTH_API_KEY": "k"}) == []


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that whoever runs this test reaches, also when it runs as nobody."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o777)
        (path / "catalog.toml").write_text(GOOD)
        (path / "file").touch()
        (path / "there").mkdir()
        (path / "to-nowhere").symlink_to("nowhere/at-all")
        (path / "read-only").mkdir(mode=0o555)
        yield path


PLACES = {
    "journal.dir": "[journal]\ndir = '{}'",
    "server.runtime_dir": "[server]\nruntime_dir = '{}'",
    "store.url": "[store]\nurl = 'sqlite:///{}'",
    "content.file": "[content]\nfile = '{}'",
}
PRESENT = {"NORTH_API_KEY": "k", "GATEWAY_CONTENT_KEY": new_key()}


@pytest.mark.parametrize("key", PLACES)
@pytest.mark.parametrize(
    ("place", "fault"),
    [
        ("{}/file/within", "{}/file is not a folder"),
        ("{}/file/far/within", "{}/file is not a folder"),
        ("{}/to-nowhere/within", "{}/to-nowhere is not a folder"),
        ("{}/read-only/within", "{}/read-only cannot be written to"),
        ("{}/read-only/far/within", "{}/read-only cannot be written to"),
        ("{}/" + "long" * 64, "too long"),
        ("{}" + "/long" * 1000 + "/within", "too long"),
    ],
)
def test_a_place_that_cannot_be_used_is_named(folder: Path, key: str, place: str, fault: str) -> None:
    config = write(folder, PLACES[key].format(place.format(folder)))
    with nobody():
        [problem] = check(config, PRESENT)
        assert (problem.file, problem.key) == (str(config), key) and not problem.warning
        assert fault.format(folder) in problem.message
        with pytest.raises(ConfigError, match=key):
            load_settings(config, {}, places=True)


@pytest.mark.parametrize(
    ("key", "place", "fault"),
    [
        ("journal.dir", "{}/file", "{}/file is not a folder"),
        ("journal.dir", "{}/read-only", "{}/read-only cannot be written to"),
        ("server.runtime_dir", "{}/file", "{}/file is not a folder"),
        ("store.url", "{}/there", "{}/there is a folder, and should be a file"),
        ("store.url", "{}/read-only/gateway.db", "{}/read-only cannot be written to"),
        ("store.url", "{}/file.db", "{}/file.db cannot be written to"),
        ("content.file", "{}/file.db", "{}/file.db cannot be written to"),
    ],
)
def test_a_file_is_no_folder_and_a_folder_no_file(folder: Path, key: str, place: str, fault: str) -> None:
    (folder / "file.db").touch(mode=0o444)
    with nobody():
        [problem] = check(write(folder, PLACES[key].format(place.format(folder))), PRESENT)
    assert (problem.key, problem.message) == (key, fault.format(folder))


def test_content_lies_beside_the_store_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    for text, file in (
        ("", "var/content.sqlite"),
        ('[store]\nurl = "sqlite:///data/g.db"', "data/content.sqlite"),
        ('[store]\nurl = "postgresql://g@db/gateway"', "var/content.sqlite"),
        ('[content]\nfile = "prompts/kept.db"', "prompts/kept.db"),
    ):
        assert load_settings(write(tmp_path, text), {}).content.file == str(tmp_path / file)


def test_content_keys_come_from_the_variable_that_is_named_and_none_is_a_warning_where_content_is_spoken_of(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "catalog.toml")
    config = write(tmp_path, '[content]\nkey_env = "MY_KEYS"')
    [problem] = check(config, {"NORTH_API_KEY": "k"})
    assert (problem.file, problem.key, problem.warning) == (str(config), "content.key_env", True) and "MY_KEYS" in problem.message
    key = new_key()
    assert check(config, {"NORTH_API_KEY": "k", "MY_KEYS": key}) == []
    settings = load_settings(config, {})
    assert content_keys(settings, {}) == () and [len(each.secret) for each in content_keys(settings, {"MY_KEYS": key})] == [32]


def test_a_malformed_content_key_is_named_by_its_variable_and_never_shown(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "catalog.toml")
    environ = {"NORTH_API_KEY": "k", "GATEWAY_CONTENT_KEY": f"{new_key()},hunter2"}
    config = write(tmp_path, "")
    [problem] = check(config, environ)
    assert (problem.file, problem.key, problem.warning) == ("environment", "GATEWAY_CONTENT_KEY", False)
    assert problem.message.startswith("key 2 of 2 is not base64 of 32 bytes")
    with pytest.raises(ConfigError) as caught:
        load_settings(config, environ)
    assert not any(part in str(caught.value) for part in environ["GATEWAY_CONTENT_KEY"].split(","))


def test_a_place_named_by_the_environment_is_blamed_there(folder: Path) -> None:
    [problem] = check(write(folder, ""), {"NORTH_API_KEY": "k", "GATEWAY_JOURNAL__DIR": f"{folder}/file"})
    assert (problem.file, problem.key) == ("environment", "GATEWAY_JOURNAL__DIR")


def test_places_that_are_there_or_can_be_made_are_fine(folder: Path) -> None:
    deep = folder / "there" / ("long-" * 30) / ("long-" * 30)  # and sockets in it are named by a descriptor
    text = f"[journal]\ndir = '{deep}'\n[server]\nruntime_dir = '{deep}'\n[store]\nurl = 'sqlite:///{folder}/file'"
    assert check(write(folder, text), {"NORTH_API_KEY": "k"}) == []
    assert not deep.exists()


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """To root every place is open, so it steps back."""
    own = os.geteuid()
    if own == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(own)


def test_a_secret_comes_from_the_variable_or_the_file(tmp_path: Path) -> None:
    assert provider_secret(provider(), {}) == ""
    by_name = provider(api_key_env="K")
    assert provider_secret(by_name, {"K": " sk-1\n"}) == "sk-1"
    assert provider_secret(by_name, {}) is None
    assert provider_secret(by_name, {"K": "a\nb"}) is None
    assert provider_secret(by_name, {"K": "schlüssel"}) is None
    (tmp_path / "key").write_text("sk-2\n")
    assert provider_secret(provider(api_key_file=str(tmp_path / "key")), {}) == "sk-2"
    assert provider_secret(provider(api_key_file=str(tmp_path / "none")), {}) is None
    assert provider_secret(provider(api_key_file=str(tmp_path)), {}) is None


def test_every_line_of_gateway_toml_says_why() -> None:
    for line in (CONFIG / "gateway.toml").read_text().splitlines():
        name, found, _ = line.partition(" = ")
        assert not found or "#" in line or name in ("host", "catalog"), f"{name} says no unit or reason"
