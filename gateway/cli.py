"""The command line: serve | check | account | key | credits | ledger | content.

Results are one line of JSON on stdout, errors one line of JSON on stderr. Commands of administration go to the running
gateway through control's admin socket; with no gateway running they work on the store itself, under its lock.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from gateway import __version__
from gateway.config import ConfigError, check, content_keys, load_settings, read_catalog
from gateway.control.administration import Administration, ContentRotation, NewAccount, NewCredits, NewKey, NewRules
from gateway.control.bookkeeper import Bookkeeper
from gateway.control.content import Rotated
from gateway.control.content.store import ContentStore
from gateway.control.leases import releaser
from gateway.control.passwords import hash_password
from gateway.control.store import StoreLocked
from gateway.control.store.opening import open_store
from gateway.domain.content_keys import new_key, read_keys
from gateway.domain.errors import GatewayError, OurFault
from gateway.link.runtime import ADMIN, RuntimeDir
from gateway.log import Log
from gateway.settings import Settings

OK, REFUSED, USAGE, UNREACHABLE = 0, 1, 2, 3
UNDRAINED = 2
RULES = ("train_paid", "train_free", "publish_free", "zdr", "log_prompts", "allow", "ignore")

EXIT_CODES = """\
exit codes:
  0  done
  1  refused: an invalid value, an existing email, an unknown account, a configuration with errors, a ledger that differs,
     content that no key at hand opens
  2  wrong usage; for `ledger verify` also: finished exchanges wait in a journal, so nothing can be said yet
  3  neither the gateway nor its store could be reached, or it is unknown whether the command was carried out
"""

STARTING_S = 5.0  # a gateway that holds the store but does not answer yet gets this long
RETRY_S = 0.1
ANSWER_S = 60.0  # verifying a large ledger


class Failure(Exception):
    """The command ends with this code and message."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class _NotRunning(Exception):
    """Nobody listens at the admin socket."""


class Command(msgspec.Struct, frozen=True):
    """One command of administration, in both ways to carry it out."""

    method: str
    path: str
    body: msgspec.Struct | None
    directly: Callable[[Administration], Awaitable[msgspec.Struct]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except Failure as failure:
        return _fail(failure.code, str(failure))
    except ConfigError as error:
        return _fail(REFUSED, "; ".join(map(str, error.problems)))
    except GatewayError as error:
        return _fail(UNREACHABLE if isinstance(error, OurFault) else REFUSED, error.message)
    return code


def _serve(arguments: argparse.Namespace) -> int:
    from gateway.supervisor import serve

    return serve(arguments.config, arguments.host, arguments.port, arguments.workers)


def _check(arguments: argparse.Namespace) -> int:
    problems = check(arguments.config)
    for problem in problems:
        sys.stderr.write(f"{problem}\n")
    ok = all(problem.warning for problem in problems)
    _write_result(msgspec.json.encode({"ok": ok, "problems": problems}))
    return OK if ok else REFUSED


def _create_account(arguments: argparse.Namespace) -> int:
    password_hash = _password_hash() if arguments.password_stdin else None
    wish = NewAccount(email=arguments.email, usd=arguments.usd, password_hash=password_hash)
    return _administer(arguments, Command("POST", "/accounts", wish, lambda administration: administration.create_account(wish)))


def _set_rules(arguments: argparse.Namespace) -> int:
    given = {name: getattr(arguments, name) for name in RULES}
    wish = NewRules(account_id=arguments.account, **{name: value for name, value in given.items() if value is not None})
    return _administer(arguments, Command("POST", "/rules", wish, lambda administration: administration.set_rules(wish)))


def _create_key(arguments: argparse.Namespace) -> int:
    wish = NewKey(
        account_id=arguments.account,
        name=arguments.name,
        limit=arguments.limit,
        limit_reset=arguments.limit_reset,
        management=arguments.management,
    )
    return _administer(arguments, Command("POST", "/keys", wish, lambda administration: administration.create_key(wish)))


def _add_credits(arguments: argparse.Namespace) -> int:
    wish = NewCredits(account_id=arguments.account, usd=arguments.usd, note=arguments.note, with_fee=arguments.with_fee)
    return _administer(arguments, Command("POST", "/credits", wish, lambda administration: administration.add_credits(wish)))


def _verify_ledger(arguments: argparse.Namespace) -> int:
    report = _carry_out(load_settings(arguments.config), Command("GET", "/ledger/verify", None, Administration.verify_ledger))
    _write_result(report)
    ok = json.loads(report)["ok"]
    return UNDRAINED if ok is None else OK if ok else REFUSED


def _new_content_key(arguments: argparse.Namespace) -> int:
    key = new_key()
    _write_result(msgspec.json.encode({"key": key, "id": read_keys(key)[0].id}))
    return OK


def _rotate_content(arguments: argparse.Namespace) -> int:
    """Part by part, so that neither the gateway nor anybody waits for long."""
    settings = load_settings(arguments.config)
    rotated, unreadable, after = 0, 0, ("", 0)
    while True:
        wish = ContentRotation(after=after)
        command = Command("POST", "/content/rotate", wish, lambda administration, wish=wish: administration.rotate_content(wish))  # type: ignore[misc]
        part = msgspec.json.decode(_carry_out(settings, command), type=Rotated)
        rotated, unreadable = rotated + part.rotated, unreadable + part.unreadable
        if part.after is None:
            break
        after = part.after
    _write_result(msgspec.json.encode({"rotated": rotated, "unreadable": unreadable}))
    return REFUSED if unreadable else OK


def _administer(arguments: argparse.Namespace, command: Command) -> int:
    _write_result(_carry_out(load_settings(arguments.config), command))
    return OK


def _carry_out(settings: Settings, command: Command) -> bytes:
    """The JSON result, from the running gateway or from the store. Raises Failure and GatewayErrors."""
    try:
        address = RuntimeDir(Path(settings.server.runtime_dir)).socket(ADMIN)
    except OSError as error:
        raise Failure(UNREACHABLE, f"{settings.server.runtime_dir} ([server] runtime_dir) cannot be used: {error.strerror}") from None
    deadline_s = time.monotonic() + STARTING_S
    while True:
        try:
            return _ask(address, command)
        except _NotRunning:
            try:
                return asyncio.run(_on_store(settings, command))
            except StoreLocked:
                if time.monotonic() >= deadline_s:
                    raise Failure(UNREACHABLE, "a gateway has the store open but does not answer") from None
        time.sleep(RETRY_S)  # it is starting or ending; nothing tells when it has


async def _on_store(settings: Settings, command: Command) -> bytes:
    store = await open_store(settings)
    content = ContentStore(Path(settings.content.file), content_keys(settings), total_bytes_max=settings.content.total_bytes_max)
    try:
        bookkeeper = Bookkeeper(store=store, folder=Path(settings.journal.dir), release=releaser(store), log=Log("cli"))
        administration = Administration(
            store=store,
            drained=bookkeeper.read_all,
            billing=settings.billing,
            catalog=lambda: read_catalog(settings)[0],
            content=content,
            content_key_env=settings.content.key_env,
        )
        return msgspec.json.encode(await command.directly(administration))
    finally:
        try:
            await content.close()
        finally:
            await store.close()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, address: str) -> None:
        super().__init__("control", timeout=ANSWER_S)
        self._address = address

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._address)


def _ask(address: str, command: Command) -> bytes:
    connection = _UnixConnection(address)
    try:
        try:
            connection.connect()
        except (FileNotFoundError, ConnectionRefusedError):
            raise _NotRunning from None
        except OSError as error:
            raise Failure(UNREACHABLE, f"the gateway's admin socket cannot be used: {error.strerror or error}") from None
        try:
            body = msgspec.json.encode(command.body) if command.body is not None else None
            connection.request(command.method, command.path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            result = answer.read()
        except (OSError, http.client.HTTPException):
            raise Failure(UNREACHABLE, "the gateway did not answer; whether the command was carried out is unknown") from None
    finally:
        connection.close()
    if answer.status != 200:
        raise Failure(UNREACHABLE if answer.status >= 500 else REFUSED, _message(result))
    return result


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "the gateway refused without a reason"


def _password_hash() -> str:
    try:
        return hash_password(sys.stdin.readline().rstrip("\r\n"))
    except ValueError as error:
        raise Failure(REFUSED, str(error)) from None


def _write_result(result: bytes) -> None:
    sys.stdout.write(result.decode() + "\n")
    sys.stdout.flush()


def _fail(code: int, message: str) -> int:
    sys.stderr.write(json.dumps({"error": {"message": message}}) + "\n")
    return code


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in the same form as all other errors."""

    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(USAGE, f"{message}; see {self.prog} --help"))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gateway", description="A self-hosted OpenRouter.", **_EPILOG)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")

    serve = _command(commands, "serve", _serve, "run the gateway in the foreground")
    serve.add_argument("--host", help="instead of [server] host")
    serve.add_argument("--port", type=_between(0, 65535), help="instead of [server] port; 0: any free one")
    serve.add_argument("--workers", type=_between(0, 64), help="instead of [server] workers; 0: one per core")
    _command(commands, "check", _check, "list every problem of the configuration and its catalog")

    accounts = _group(commands, "account", "accounts")
    account = _command(accounts, "create", _create_account, "create an account with two keys")
    account.add_argument("--email", required=True)
    account.add_argument("--usd", default="0", help="first credit, such as 10.00")
    account.add_argument("--password-stdin", action="store_true", help="read a password for signing in from the first line of stdin")

    rules = _command(accounts, "set", _set_rules, "change what an account allows; without a change: show it")
    rules.add_argument("--account", required=True, metavar="ID")
    may = "may serve this account"
    rules.add_argument("--train-paid", type=_on_or_off, metavar="on|off", help=f"endpoints that may train on prompts, or do not say, {may}")
    rules.add_argument("--train-free", type=_on_or_off, metavar="on|off", help="the same for free endpoints")
    rules.add_argument("--publish-free", type=_on_or_off, metavar="on|off", help=f"free endpoints that publish prompts {may}")
    rules.add_argument("--zdr", type=_on_or_off, metavar="on|off", help=f"only endpoints with zero data retention {may}")
    rules.add_argument("--log-prompts", type=_on_or_off, metavar="on|off", help="keep requests and answers, for the account's own review")
    rules.add_argument("--allow", type=_slugs, metavar="SLUG,...", help=f'only these providers {may}; "": all')
    rules.add_argument("--ignore", type=_slugs, metavar="SLUG,...", help=f'none of these providers {may}; "": no such provider')

    key = _command(_group(commands, "key", "keys"), "create", _create_key, "create a key, shown once")
    key.add_argument("--account", required=True, metavar="ID")
    key.add_argument("--name", required=True)
    key.add_argument("--limit", metavar="USD", help="what the key may spend; without it: all the account has")
    key.add_argument("--limit-reset", choices=("daily", "weekly", "monthly"), help="when spending begins anew; without it: never")
    key.add_argument("--management", action="store_true", help="a key that manages keys and cannot be used for inference")

    added = _command(_group(commands, "credits", "credit of accounts"), "add", _add_credits, "top an account up")
    added.add_argument("--account", required=True, metavar="ID")
    added.add_argument("--usd", required=True, help="such as 5.00")
    added.add_argument("--note", default="", help="kept with the entry")
    added.add_argument("--with-fee", action="store_true", help="book the fee of a purchase along with it, as paid on top")

    content = _group(commands, "content", "prompts and answers that accounts have kept")
    _command(content, "key", _new_content_key, "make a key to encrypt them with, for [content] key_env", config=False)
    _command(content, "rotate", _rotate_content, "encrypt anew, with the first key, what is kept under others; the gateway may run")

    _command(_group(commands, "ledger", "the ledger"), "verify", _verify_ledger, "rebuild every balance from its entries")
    return parser


_EPILOG: dict[str, Any] = {"epilog": EXIT_CODES, "formatter_class": argparse.RawDescriptionHelpFormatter}


def _group(commands: Any, name: str, help_text: str) -> Any:
    return commands.add_parser(name, help=help_text, **_EPILOG).add_subparsers(required=True, metavar="command")


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], help_text: str, *, config: bool = True
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=help_text, description=help_text, **_EPILOG)
    if config:
        command.add_argument("--config", required=True, type=Path, metavar="FILE")
    command.set_defaults(run=run)
    return command


def _on_or_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError("must be on or off")
    return text == "on"


def _slugs(text: str) -> tuple[str, ...]:
    return tuple(slug.strip() for slug in text.split(",") if slug.strip())


def _between(least: int, most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}")
        return int(text)

    return number
