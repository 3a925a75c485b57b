"""Strict reading of written documents (parsed TOML) into structs, with every problem found, not only the first.

A problem names its file and the dotted key, so that an operator can go there. Nothing here opens a file.
"""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

UNSET = msgspec.UNSET
T = TypeVar("T", bound=msgspec.Struct)


class Problem(msgspec.Struct, frozen=True):
    """One finding: an error, or a warning with which one can start all the same."""

    file: str
    key: str  # "server.port", "models[2].endpoints[0].pricing.prompt"; "line 3" in a file that is not TOML
    message: str
    warning: bool = False

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.key, ("warning: " if self.warning else "") + self.message) if part)


class Place(msgspec.Struct, frozen=True):
    """Where in a file a value stands."""

    file: str
    key: str = ""

    def at(self, key: str | int) -> Place:
        """The place of a member of this table or list."""
        if isinstance(key, int):
            return Place(self.file, f"{self.key}[{key}]")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", key):
            key = repr(key)
        return Place(self.file, f"{self.key}.{key}" if self.key else key)

    def __str__(self) -> str:
        return f"{self.file}: {self.key}"


class Findings:
    """Collects problems while a document is read."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def error(self, place: Place, message: str) -> None:
        self.problems.append(Problem(place.file, place.key, message))

    def warn(self, place: Place, message: str) -> None:
        self.problems.append(Problem(place.file, place.key, message, warning=True))

    @property
    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if not problem.warning]


def read(kind: type[T], table: object, place: Place, findings: Findings) -> T | None:
    """The struct written in `table`; None if it is no table. Unknown and missing keys and wrong values become an error each.

    A faulty value is left at its default, or None without one, so that the rest can still be checked: after an error
    (see `findings`) the struct is for further checks only, never for use.
    """
    if not isinstance(table, dict):
        findings.error(place, f"expected a table, got {_named(table)}")
        return None
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    unknown_keys(table, fields, place, findings)
    values: dict[str, Any] = {}
    for key, field in fields.items():
        value = _value(field.type, table[key], place.at(key), findings) if key in table else UNSET
        if value is not UNSET:
            values[field.name] = value
        elif field.required:
            values[field.name] = None
            if key not in table:
                findings.error(place.at(key), "missing")
    return kind(**values)


def unknown_keys(table: dict[str, Any], known: typing.Iterable[str], place: Place, findings: Findings) -> None:
    """One error per key that nobody reads, with the nearest known one."""
    known = list(known)
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            findings.error(place.at(key), f"unknown key; did you mean {near[0]}?" if near else "unknown key")


def http_url_fault(url: str) -> str | None:
    """Why `url` cannot be the base of calls, or None: http(s) with a host; no userinfo, query or fragment; ASCII without blanks."""
    if not re.fullmatch(r"[!-~]+", url):
        return "not an http(s) URL: blanks, control or non-ASCII characters"
    if re.search(r"[\"<>\\^`{|}]", url):
        return "not an http(s) URL: characters that must be percent-encoded"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return f"not an http(s) URL: {error}"
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        return "must be http://host[:port][/path] or https://..."
    if "@" in parts.netloc:
        return "must not hold a user or password"
    if "?" in url or "#" in url:
        return "must not have a query or fragment"
    return None


def _value(kind: Any, value: object, place: Place, findings: Findings) -> Any:
    """`value` as `kind`, or UNSET: tables and lists of tables by `read`, the rest by msgspec with its constraints."""
    struct = next((member for member in _members(kind) if _is_struct(member)), None)
    if struct is not None:
        table = read(struct, value, place, findings)
        return UNSET if table is None else table
    item = next((typing.get_args(member)[0] for member in _members(kind) if typing.get_origin(member) is tuple), None)
    if item is not None and _is_struct(item) and isinstance(value, list) and value:
        tables = (read(item, table, place.at(i), findings) for i, table in enumerate(value))
        return tuple(table for table in tables if table is not None)
    entry = next((typing.get_args(member)[1] for member in _members(kind) if typing.get_origin(member) is dict), None)
    if entry is not None and isinstance(value, dict):
        return {key: _value(entry, part, place.at(key), findings) for key, part in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        findings.error(place, "must be a finite number")
        return UNSET
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        wanted = _wanted(item if path and item is not None else kind)
        given = f", got {value}" if isinstance(value, int | float) else ""  # never a string: it may hold a secret
        findings.error(Place(place.file, place.key + path.rstrip("`")), f"must be {wanted}{given}" if wanted else _sentence(message, given))
        return UNSET


def _members(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a type, without their annotations."""
    if typing.get_origin(kind) is typing.Annotated:
        return _members(typing.get_args(kind)[0])
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return tuple(member for part in typing.get_args(kind) for member in _members(part))
    return (kind,)


def _wanted(kind: Any) -> str | None:
    """What a type asks for, in words, where it says so: its description, or the choices it leaves."""
    described = [kind] + (list(typing.get_args(kind)) if isinstance(kind, types.UnionType) else [])
    for part in described:
        for meta in getattr(part, "__metadata__", ()):
            if isinstance(meta, msgspec.Meta) and meta.description:
                return meta.description
    choices = [
        str(choice) for member in _members(kind) if typing.get_origin(member) is typing.Literal for choice in typing.get_args(member)
    ]
    return f"one of {', '.join(choices)}" if len(choices) > 1 else (choices[0] if choices else None)


_WORDS = {"str": "a string", "int": "a whole number", "float": "a number", "bool": "true or false", "array": "a list", "object": "a table"}


def _sentence(message: str, given: str) -> str:
    """msgspec's message in an operator's words, with the number that was given."""
    message = re.sub(r"`([a-z]+)( \| null)?`", lambda found: _WORDS.get(found[1], found[1]), message).replace("`", "")
    message = message[:1].lower() + message[1:]
    return message if ", got " in message else message + given


def _named(value: object) -> str:
    return {str: "a string", list: "a list", bool: "a boolean", int: "a number", float: "a number"}.get(type(value), "something else")


def _is_struct(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)
