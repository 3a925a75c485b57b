"""One TOML file and the environment, read into settings and a catalog. What is wrong is told all at once, with file and key.

Relative paths are taken from the config file's folder; the returned settings hold absolute ones.
"""

from __future__ import annotations

import glob
import ipaddress
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from gateway.domain.catalog import Catalog, Provider
from gateway.domain.catalog_rules import Document, compile_catalog
from gateway.domain.content_keys import ContentKey, read_keys
from gateway.domain.document import Findings, Place, Problem, http_url_fault, read
from gateway.domain.money import parse_usd
from gateway.places import file_fault, folder_fault
from gateway.settings import PERCENT_STEP_NANOS, Settings

SQLITE = "sqlite:///"  # a path follows
ENVIRONMENT = "GATEWAY_"  # GATEWAY_SERVER__PORT=9000 overrides port of [server]


class ConfigError(Exception):
    """The configuration cannot be used. `problems` holds every error found; the text has one line for each."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


def load_settings(path: Path, environ: Mapping[str, str] | None = None, *, places: bool = False) -> Settings:
    """The settings in this file, overridden by the environment, with absolute paths. Raises ConfigError with all problems.

    `places`: files that cannot be kept where the settings say are problems, too.
    """
    findings = Findings()
    settings, _ = _settings(path, os.environ if environ is None else environ, findings, places=places)
    if settings is None:
        raise ConfigError(findings.errors)
    return settings


def read_catalog(settings: Settings, environ: Mapping[str, str] | None = None) -> tuple[Catalog, list[Problem]]:
    """The catalog that the settings name, and warnings. Raises ConfigError with all errors; then nothing of it is to be used."""
    findings = Findings()
    catalog = _catalog(settings.catalog, os.environ if environ is None else environ, findings)
    if catalog is None:
        raise ConfigError(findings.errors)
    return catalog, findings.problems


def check(path: Path, environ: Mapping[str, str] | None = None) -> list[Problem]:
    """Every error and warning of this configuration and of its catalog; the catalog is read even if settings are wrong."""
    environ = os.environ if environ is None else environ
    findings = Findings()
    settings, catalog = _settings(path, environ, findings, places=True)
    if settings is not None and "content" in (_toml(path, Findings()) or {}) and not content_keys(settings, environ):
        key_env = settings.content.key_env
        findings.warn(Place(str(path), "content.key_env"), f"the variable {key_env} is not set: no account can have its prompts kept")
    if catalog:
        _catalog(catalog, environ, findings)
    return findings.problems


def sqlite_path(settings: Settings) -> Path:
    """The file of a SQLite store. Raises ValueError if the store is another."""
    if not settings.store.url.startswith(SQLITE):
        raise ValueError("the store is not SQLite")
    return Path(settings.store.url.removeprefix(SQLITE))


def provider_secret(provider: Provider, environ: Mapping[str, str] | None = None) -> str | None:
    """The provider's API key; "" if it needs none; None if it should have one that cannot be had (out of service)."""
    return _secret(provider, os.environ if environ is None else environ)[0]


def content_keys(settings: Settings, environ: Mapping[str, str] | None = None) -> tuple[ContentKey, ...]:
    """Keys for the prompts that accounts have kept, the newest first; none: nothing is kept. Raises ConfigError, without any key's text."""
    variable = settings.content.key_env
    try:
        return read_keys((os.environ if environ is None else environ).get(variable, ""))
    except ValueError as error:
        raise ConfigError([Problem("environment", variable, str(error))]) from None


def _settings(path: Path, environ: Mapping[str, str], findings: Findings, *, places: bool) -> tuple[Settings | None, tuple[str, ...]]:
    """Settings (None after an error), and the catalog's paths as far as they could be read."""
    document = _toml(path, findings)
    if document is None:
        return None, ()
    overridden = _override(document, environ, findings)
    for name, table in document.items():
        if isinstance(table, dict) and "catalog" in table:  # TOML has no way back to the top level
            findings.error(Place(str(path), f"{name}.catalog"), "belongs to the top level: move it above the first [table]")
            document = {**document, name: {key: value for key, value in table.items() if key != "catalog"}, "catalog": table["catalog"]}
    settings = read(Settings, document, Place(str(path)), findings)
    folder = path.absolute().parent
    if settings is not None:  # also after errors: what could be read is checked, so that one run tells all
        for key, message in chain(_faults(settings, folder), _place_faults(_resolved(settings, folder)) if places else ()):
            findings.error(Place(str(path), key), message)
        try:
            content_keys(settings, environ)
        except ConfigError as error:
            findings.problems += error.problems
    findings.problems[:] = [
        msgspec.structs.replace(problem, file="environment", key=overridden[key]) if key in overridden else problem
        for problem, key in ((problem, problem.key.partition("[")[0]) for problem in findings.problems)
    ]
    entries = document.get("catalog", list(Settings().catalog))
    catalog = tuple(_absolute(folder, entry) for entry in entries if isinstance(entry, str)) if isinstance(entries, list) else ()
    if settings is None or findings.errors:
        return None, catalog
    return _resolved(settings, folder), catalog


def _toml(path: Path, findings: Findings) -> dict[str, Any] | None:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))  # some editors on Windows put a byte order mark first
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"line \d+", str(error))
        findings.error(Place(str(path), line[0] if line else "end of file"), f"not TOML: {error}")
    except UnicodeDecodeError as error:
        findings.error(Place(str(path)), f"not UTF-8 at byte {error.start}")
    except RecursionError:
        findings.error(Place(str(path)), "nested too deeply")
    except ValueError as error:  # Python's own limit on the digits of a number
        findings.error(Place(str(path)), f"not TOML: {str(error).partition(';')[0]}")
    except OSError as error:
        findings.error(Place(str(path)), f"cannot be read: {error.strerror}")
    return None


def _override(document: dict[str, Any], environ: Mapping[str, str], findings: Findings) -> dict[str, str]:
    """Writes GATEWAY_SECTION__KEY variables into the document; returns which dotted key came from which variable."""
    sections = {field.name: field.type for field in msgspec.structs.fields(Settings)}
    overridden: dict[str, str] = {}
    for name in sorted(environ):
        section, found, key = name.removeprefix(ENVIRONMENT).lower().partition("__")
        if not name.startswith(ENVIRONMENT) or (not found and section != "catalog"):
            continue  # others use the prefix too: Kubernetes sets GATEWAY_PORT for a service of this name
        if not found:
            document["catalog"] = _from_text(sections["catalog"], environ[name])
            overridden["catalog"] = name
            continue
        kind = sections.get(section) if section != "catalog" else None
        kinds = {} if kind is None else {field.name: field.type for field in msgspec.structs.fields(kind)}
        if key not in kinds:
            findings.error(Place("environment", name), "names no setting")
        elif isinstance(table := document.setdefault(section, {}), dict):
            table[key] = _from_text(kinds[key], environ[name])
            overridden[f"{section}.{key}"] = name
    return overridden


def _from_text(kind: Any, text: str) -> Any:
    """A variable's text as the document would hold it: lists by commas, text as it is, numbers and booleans as in TOML."""
    for value in (text, [part.strip() for part in text.split(",") if part.strip()]):
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError:
            continue
        return value
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # also Python's own limit on the digits of a number
        return text


def _faults(settings: Settings, folder: Path) -> Iterator[tuple[str, str]]:
    """What a type cannot say: (key, message) of each."""
    server, operations = settings.server, settings.operations
    for key, url in (("server.public_url", server.public_url), ("routing.prometheus_url", settings.routing.prometheus_url)):
        if url and (fault := http_url_fault(url)):
            yield key, fault
    for i, network in enumerate(server.trusted_proxies):
        try:
            ipaddress.ip_network(network)
        except ValueError:
            yield f"server.trusted_proxies[{i}]", "must be an address or a network such as 10.0.0.0/8, without host bits"
    if bool(server.tls_cert) != bool(server.tls_key):
        yield "server.tls_key" if server.tls_cert else "server.tls_cert", "missing: certificate and key come together"
    for key, file in (("server.tls_cert", server.tls_cert), ("server.tls_key", server.tls_key)):
        if file and not os.access(name := _absolute(folder, file), os.R_OK):
            yield key, f"{name} cannot be read"
    if server.port and server.port == operations.port and server.host == operations.host:
        yield "operations.port", "is server.port already; operations must stay private, on a port of their own"
    if not re.fullmatch(r"sqlite:///[^?#]*[^?#/]|postgresql://.+", settings.store.url):
        yield "store.url", "must be sqlite:///PATH (relative), sqlite:////PATH (absolute) or postgresql://..."
    if settings.routing.breaker_open_s_max < settings.routing.breaker_open_s:
        yield "routing.breaker_open_s_max", "is under breaker_open_s"
    yield from _money_faults(settings)


def _place_faults(settings: Settings) -> Iterator[tuple[str, str]]:
    """Of settings with absolute paths."""
    faults = {
        "journal.dir": folder_fault(Path(settings.journal.dir)),
        "server.runtime_dir": folder_fault(Path(settings.server.runtime_dir)),
    }
    if settings.store.url.startswith(SQLITE):
        faults["store.url"] = file_fault(sqlite_path(settings))
    if not faults.get("store.url"):  # which lie in one folder, unless the settings say otherwise: told once
        faults["content.file"] = file_fault(Path(settings.content.file))
    yield from ((key, fault) for key, fault in faults.items() if fault is not None)


def _money_faults(settings: Settings) -> Iterator[tuple[str, str]]:
    """Texts that end in _usd or _percent are decimal, at least 0."""
    for name, part in (("routing", settings.routing), ("limits", settings.limits), ("billing", settings.billing)):
        for key, value in msgspec.structs.asdict(part).items():
            if not isinstance(value, str):
                continue  # a count, such as requests_per_minute_per_usd
            try:
                if key.endswith("_usd") and parse_usd(value) < 0:
                    yield f"{name}.{key}", "must not be negative"
                if key.endswith("_percent") and not 0 <= parse_usd(value) <= parse_usd("100"):
                    yield f"{name}.{key}", 'must be a percentage from "0" to "100"'
                if key == "logging_discount_percent" and parse_usd(value) % PERCENT_STEP_NANOS:
                    yield f"{name}.{key}", "must be no finer than 0.0001"
            except ValueError:
                yield f"{name}.{key}", 'must be a decimal string such as "0.80", no finer than 0.000000001'


def _resolved(settings: Settings, folder: Path) -> Settings:
    replace = msgspec.structs.replace
    server, url = settings.server, settings.store.url
    data = "var"
    if url.startswith(SQLITE):
        url = SQLITE + _absolute(folder, url.removeprefix(SQLITE))
        data = str(Path(url.removeprefix(SQLITE)).parent)
    return replace(
        settings,
        catalog=tuple(_absolute(folder, entry) for entry in settings.catalog),
        server=replace(
            server,
            tls_cert=server.tls_cert and _absolute(folder, server.tls_cert),
            tls_key=server.tls_key and _absolute(folder, server.tls_key),
            runtime_dir=_absolute(folder, server.runtime_dir or "var/run"),
        ),
        store=replace(settings.store, url=url),
        journal=replace(settings.journal, dir=_absolute(folder, settings.journal.dir)),
        content=replace(settings.content, file=_absolute(folder, settings.content.file or f"{data}/content.sqlite")),
    )


def _absolute(folder: Path, path: str) -> str:
    return os.path.normpath(folder / path)


def _catalog(entries: tuple[str, ...], environ: Mapping[str, str], findings: Findings) -> Catalog | None:
    before = len(findings.errors)
    documents = []
    for file in _catalog_files(entries, findings):
        if (table := _toml(file, findings)) is not None:
            documents.append(Document(file=str(file), table=table))
    catalog, places = compile_catalog(documents, findings)
    for provider in catalog.providers.values() if catalog is not None else ():
        secret, key, reason = _secret(provider, environ)
        if secret is None:
            findings.warn(places[provider.slug].at(key), f"{reason}: {provider.slug}'s endpoints are out of service")
    return catalog if len(findings.errors) == before else None


def _catalog_files(entries: tuple[str, ...], findings: Findings) -> list[Path]:
    """Files in the order named, each once: a folder stands for its *.toml, a pattern for what it matches, both sorted."""
    files: dict[Path, None] = {}
    for i, entry in enumerate(entries):
        path = Path(entry)
        if path.is_dir():
            found = sorted(path.glob("[!.]*.toml"))
        elif path.exists() or not re.search(r"[*?[]", entry):
            found = [path]
        else:
            found = sorted(Path(name) for name in glob.glob(entry))  # noqa: PTH207 (an absolute pattern)
        if not found:
            findings.error(Place(entry, f"catalog[{i}]"), "no catalog file here")
        files.update(dict.fromkeys(found))
    return list(files)


def _secret(provider: Provider, environ: Mapping[str, str]) -> tuple[str | None, str, str]:
    """The secret or None, the key that names its place, and why it is None."""
    if provider.api_key_env:
        key, where, text = "api_key_env", f"the variable {provider.api_key_env}", environ.get(provider.api_key_env, "")
    elif provider.api_key_file:
        key, where = "api_key_file", provider.api_key_file
        try:
            text = Path(provider.api_key_file).read_bytes().decode("latin-1")
        except OSError as error:
            return None, key, f"{where} cannot be read ({error.strerror})"
    else:
        return "", "", ""
    text = text.strip()
    if not text:
        return None, key, f"{where} is not set" if key == "api_key_env" else f"{where} is empty"
    if not re.fullmatch(r"[!-~]+", text):
        return None, key, f"{where} holds blanks, control or non-ASCII characters"
    return text, key, ""
