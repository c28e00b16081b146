"""What does `tierway keys` do? It asks the admin API of a running gateway to make, show and change keys of its store.

The key is printed once, where it was made; whoever needs it has to take it from there.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Annotated, TextIO, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import msgspec
from msgspec import Meta

from backends.weights import local_model_ids
from gateway.config.load import load
from gateway.config.model import Admin
from gateway.config.secrets import SecretError, resolve

VARIABLE = "TIERWAY_ADMIN_KEY"
_T = TypeVar("_T")
_LIMIT_S = 15.0
_LARGEST_ANSWER = 16 * 1024 * 1024
_FIELDS = ("team", "user", "priority", "expires")


class KeysFailed(Exception):  # noqa: N818 - the message is what is said
    """It could not be done; the message says why and what can be done about it."""


class _Shown(msgspec.Struct, kw_only=True):
    """What is printed of a key. More may come, and is kept for `--json`."""

    name: str
    source: str = ""
    state: str = ""
    team: str | None = None
    user: str | None = None
    models: list[str] | None = None
    priority: int = 0
    tags: list[str] = []
    metadata: dict[str, str] = {}
    admin: bool = False
    expires: str | None = None
    created: str | None = None
    changed: str | None = None
    replaced: list[dict[str, str]] = []
    key: str | None = None


class _Listed(msgspec.Struct):
    data: list[msgspec.Raw]
    next: str | None = None


class _Error(msgspec.Struct):
    message: Annotated[str, Meta(max_length=4096)]


class _Refused(msgspec.Struct):
    error: _Error


# -- what can be typed ------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands of `tierway keys` to `parser`."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--config",
        type=Path,
        default=Path("gateway.yaml"),
        metavar="FILE",
        help="whose server.admin says where the admin API is and what its key is (default: gateway.yaml)",
    )
    shared.add_argument("--url", help="address of the admin API, such as http://127.0.0.1:8081 (default: of the file)")
    shared.add_argument("--json", action="store_true", help="print what the admin API answers, for machines")
    parser.epilog = f"The admin key is taken from {VARIABLE} where that is set, else as the file says."
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="keys_command", title="commands")

    def command(name: str, what: str, *, named: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".", parents=[shared])
        if named:
            made.add_argument("name", help="name of the key")
        return made

    create = command("create", "make a key; it is shown this once")
    create.add_argument("--team", help="the team it belongs to")
    create.add_argument("--user", help="the user it belongs to, whatever a request says")
    create.add_argument("--models", type=_words, help="names it may ask for, with commas (default: all)")
    create.add_argument("--priority", type=int, help="who is served first where requests wait: the higher one")
    create.add_argument("--tag", action="append", default=[], dest="tags", help="word to find it by; may be repeated")
    create.add_argument(
        "--metadata",
        action="append",
        default=[],
        type=_pair,
        metavar="NAME=VALUE",
        help="for the bill; may be repeated",
    )
    create.add_argument("--expires", help="when it ends, such as 2027-01-31T00:00:00Z (default: never)")
    create.add_argument("--admin", action="store_true", help="may read /status")
    listing = command("list", "list all keys, those of the configuration too", named=False)
    listing.add_argument("--team", help="only those of a team")
    listing.add_argument("--tag", help="only those with a tag")
    command("show", "show a key")
    rotate = command("rotate", "make another key in its place; the old one holds for a time")
    rotate.add_argument("--grace", default="24h", help="for how long, 0s for not at all (default: 24h)")
    command("disable", "refuse it from now on")
    command("enable", "take it again")
    expire = command("expire", "let it end")
    expire.add_argument("--at", help="when, such as 2027-01-31T00:00:00Z, or never (default: now)")
    command("delete", "forget it")


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError("expected NAME=VALUE")
    return name, value


# -- what is done -----------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> int:
    """Do what the options say; return the exit status."""
    try:
        api = _api(options, environ)
        if options.keys_command == "list":
            _list(api, options, sys.stdout)
        else:
            _one(api, options, sys.stdout)
    except KeysFailed as why:
        print(f"tierway keys: {why}", file=sys.stderr)
        return 1
    return 0


def _one(api: AdminApi, options: argparse.Namespace, out: TextIO) -> None:
    path = f"/admin/keys/{quote(options.name, safe='')}" if options.keys_command != "create" else "/admin/keys"
    match options.keys_command:
        case "create":
            answer = api.ask("POST", path, _creation(options))
        case "show":
            answer = api.ask("GET", path)
        case "rotate":
            answer = api.ask("POST", f"{path}/rotate", {"grace": options.grace})
        case "disable" | "enable":
            answer = api.ask("PATCH", path, {"disabled": options.keys_command == "disable"})
        case "expire":
            at = options.at or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            answer = api.ask("PATCH", path, {"expires": None if at == "never" else at})
        case _:
            answer = api.ask("DELETE", path)
    if options.json:
        out.write(f"{answer.decode()}\n")
        return
    shown = _understood(answer, _Shown)
    if options.keys_command == "delete":
        out.write(f"The key {shown.name} is deleted.\n")
        return
    if shown.key is not None:
        out.write(f"The key, shown this once:\n\n  {shown.key}\n\n")
    _describe(shown, out)


def _creation(options: argparse.Namespace) -> dict[str, object]:
    body: dict[str, object] = {"name": options.name}
    body |= {name: getattr(options, name) for name in (*_FIELDS, "models") if getattr(options, name) is not None}
    if options.admin:
        body["admin"] = True
    return body | {"tags": options.tags, "metadata": dict(options.metadata)}


def _describe(shown: _Shown, out: TextIO) -> None:
    lines = {
        "name": shown.name,
        "state": shown.state,
        "kept in": {"config": "the configuration", "store": "the store"}.get(shown.source, shown.source),
        "team": shown.team,
        "user": shown.user,
        "models": "all" if shown.models is None else ", ".join(shown.models) or "none",
        "priority": str(shown.priority),
        "tags": ", ".join(shown.tags),
        "metadata": ", ".join(f"{name}={value}" for name, value in shown.metadata.items()),
        "admin": "yes" if shown.admin else None,
        "expires": shown.expires or "never",
        "created": shown.created,
        "changed": shown.changed,
        "older keys": ", ".join(f"one until {old.get('until')}" for old in shown.replaced),
    }
    out.writelines(f"{title:<11}{value}\n" for title, value in lines.items() if value)


def _list(api: AdminApi, options: argparse.Namespace, out: TextIO) -> None:
    asked = {name: value for name in ("team", "tag") if (value := getattr(options, name)) is not None}
    after, rows = "", [("NAME", "STATE", "TEAM", "USER", "EXPIRES", "KEPT IN")]
    while True:
        query = urlencode({"limit": 500, "after": after, **asked})
        listed = _understood(api.ask("GET", f"/admin/keys?{query}"), _Listed)
        for raw in listed.data:
            if options.json:
                out.write(f"{bytes(raw).decode()}\n")
                continue
            one = _understood(bytes(raw), _Shown)
            rows.append((one.name, one.state, one.team or "", one.user or "", one.expires or "never", one.source))
        if listed.next is None:
            break
        after = listed.next
    if not options.json:
        _table(rows, out)


def _table(rows: Sequence[tuple[str, ...]], out: TextIO) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    out.writelines(f"{line.rstrip()}\n" for line in lines)


def _understood(answer: bytes, wanted: type[_T]) -> _T:
    try:
        return msgspec.json.decode(answer, type=wanted)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise KeysFailed("what answered is not the admin API of tierway") from None


# -- whom it asks -----------------------------------------------------------------------------------------------------


class AdminApi:
    """The admin API at `url`."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url
        self._key = key
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise KeysFailed(f"{url!r} is no address such as http://127.0.0.1:8081")
        self._parts = parts

    def ask(self, method: str, path: str, body: object = None) -> bytes:
        """Ask; return the answer. Raises KeysFailed."""
        # Not urllib: it would show the admin key to a proxy that the environment names.
        make = HTTPSConnection if self._parts.scheme == "https" else HTTPConnection
        headers = {"authorization": f"Bearer {self._key}", "content-type": "application/json"}
        content = None if body is None else msgspec.json.encode(body)
        try:
            connection = make(self._parts.hostname or "", self._parts.port, timeout=_LIMIT_S)
            try:
                connection.request(method, self._parts.path.rstrip("/") + path, content, headers)
                answer = connection.getresponse()
                status, said = answer.status, answer.read(_LARGEST_ANSWER)
            finally:
                connection.close()
        except (OSError, HTTPException, ValueError) as fault:
            why = getattr(fault, "strerror", None) or str(fault) or type(fault).__name__
            raise KeysFailed(
                f"the admin API at {self._url} cannot be asked: {why}. Is the gateway running, with server.admin?"
            ) from None
        if status >= 400:
            raise KeysFailed(_refusal(status, said))
        return said


def _refusal(status: int, said: bytes) -> str:
    try:
        message = msgspec.json.decode(said, type=_Refused).error.message
    except (msgspec.DecodeError, UnicodeDecodeError):
        return f"what answered ({status}) is not the admin API of tierway"
    return f"refused: {message}"


def _api(options: argparse.Namespace, environ: Mapping[str, str]) -> AdminApi:
    """Find out where the admin API is and what its key is. Raises KeysFailed and ConfigError."""
    key, url = environ.get(VARIABLE), options.url
    if key and url:
        return AdminApi(url, key)
    loaded = load(options.config, local_model_ids=local_model_ids())
    admin = loaded.config.server.admin
    if admin is None:
        raise KeysFailed(
            f"{options.config} has no server.admin, so there is no admin API. "
            f"To ask another gateway give --url and set {VARIABLE}."
        )
    if not key:
        try:
            key = resolve(admin.key, folder=loaded.beside("."), environ=environ).reveal()
        except SecretError as error:
            raise KeysFailed(f"the admin key cannot be had: {error}. Set it, or {VARIABLE}.") from None
    return AdminApi(url or _url(admin), key)


def _url(admin: Admin) -> str:
    if not admin.port:
        raise KeysFailed("the file lets the admin API take any free port; give its address with --url")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(admin.host, admin.host)  # noqa: S104 - read, not bound
    return f"http://[{host}]:{admin.port}" if ":" in host else f"http://{host}:{admin.port}"
