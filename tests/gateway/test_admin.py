"""Does the admin API do what it is told, for the operator alone, and say what is wrong? Over HTTP, keys in a real Redis."""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from gateway.key_store import digest_of
from tests.gateway.admin_server import ADMIN_KEY, AdminServer, as_key, running_admin
from tests.servers.redis import RedisServer, running_redis


class Clock:
    """The time that the admin API believes."""

    def __init__(self) -> None:
        self.s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def admin(redis_server: RedisServer, clock: Clock) -> Iterator[AdminServer]:
    with running_admin(redis_server, options={"time_s": clock}) as server:
        yield server


def test_nobody_without_the_admin_key_learns_anything(admin: AdminServer) -> None:
    for method, path in [
        ("GET", "/admin/keys"),
        ("POST", "/admin/keys"),
        ("GET", "/nothing"),
        ("PUT", "/admin/keys/x"),
    ]:
        for key in (None, "wrong", ADMIN_KEY + "x", ADMIN_KEY[:-1], "", "Ümlaut".encode().decode("latin-1")):
            reply = admin.ask(method, path, key=key)
            assert reply.status == 401
            assert reply.error["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"].startswith("Bearer ")
            assert reply.headers["x-request-id"]


def test_a_key_is_shown_when_it_is_made_and_never_again(admin: AdminServer) -> None:
    fields = {
        "team": "red",
        "user": "Jürgen",
        "models": ["auto"],
        "priority": 5,
        "tags": ["ci", "nightly"],
        "metadata": {"cost-centre": "17"},
        "expires": "2030-01-31T01:00:00+01:00",
        "admin": True,
    }
    reply = admin.ask("POST", "/admin/keys", {"name": "alice", **fields})
    made = as_key(reply)
    assert reply.status == 201
    assert reply.headers["cache-control"] == "no-store"
    key = made.pop("key")
    assert re.fullmatch(r"tw-[A-Za-z0-9_-]{43}", key)
    assert made == {
        "name": "alice",
        "source": "store",
        "state": "active",
        **fields,
        "expires": "2030-01-31T00:00:00Z",
        "created": "2027-01-15T08:00:00Z",
        "changed": "2027-01-15T08:00:00Z",
        "replaced": [],
    }
    shown = admin.ask("GET", "/admin/keys/alice")
    assert as_key(shown) == made
    assert key not in shown.body.decode()
    assert digest_of(key) not in shown.body.decode()
    assert admin.caller(key) == "alice"


def test_what_is_not_given_is_as_in_the_configuration(admin: AdminServer) -> None:
    admin.create("plain")
    shown = as_key(admin.ask("GET", "/admin/keys/plain"))
    unsaid: dict[str, Any] = {
        "models": None,
        "admin": False,
        "team": None,
        "user": None,
        "priority": 0,
        "tags": [],
        "metadata": {},
    }
    assert {name: shown[name] for name in unsaid} == unsaid
    assert shown["expires"] is None


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "name", "Missing 'name'"),
        ({"name": ""}, "name", "expected a name"),
        ({"name": "white space"}, "name", "at most 128"),
        ({"name": "x" * 129}, "name", "at most 128"),
        ({"name": "tw-" + "x" * 43}, "name", "looks like a key"),
        ({"name": "a", "nmae": 1}, "nmae", "did you mean `name`"),
        ({"name": "a", "key": "mine"}, "key", "no field"),
        ({"name": "a", "priority": "5"}, "priority", "int"),
        ({"name": "a", "priority": 101}, "priority", "100"),
        ({"name": "a", "priority": 1.5}, "priority", "int"),
        ({"name": "a", "priority": 10**30}, "priority", "range|int"),
        ({"name": "a", "team": "rde"}, "team", "did you mean `red`"),
        ({"name": "a", "team": 7}, "team", "str"),
        ({"name": "a", "models": ["auto", "smal"]}, "models[1]", "did you mean `small`"),
        ({"name": "a", "models": "auto"}, "models", "array"),
        ({"name": "a", "models": ["auto"] * 257}, "models", "256"),
        ({"name": "a", "user": ""}, "user", "length"),
        ({"name": "a", "user": "x" * 257}, "user", "length"),
        ({"name": "a", "tags": ["x"] * 33}, "tags", "32"),
        ({"name": "a", "tags": ["with space"]}, "tags[0]", "a name"),
        ({"name": "a", "metadata": {"a": 1}}, "metadata[...]", "str"),
        ({"name": "a", "metadata": {"a b": "1"}}, "metadata", "a name"),
        ({"name": "a", "metadata": {"a": "x" * 513}}, "metadata[...]", "512"),
        ({"name": "a", "expires": "tomorrow"}, "expires", "a time with its zone"),
        ({"name": "a", "expires": "2027-02-30T00:00:00Z"}, "expires", "no such time"),
        ({"name": "a", "expires": "9999-12-31T23:59:59-23:59"}, "expires", "no such time"),
        ({"name": "a", "expires": "0000-01-01T00:00:00Z"}, "expires", "no such time"),
        ({"name": "a\n"}, "name", "line break|a name"),
        (b'{"name": "a", "user": "\\udc00"}', None, "JSON"),
        ({"name": "a", "expires": "2020-01-01T00:00:00Z"}, "expires", "is over"),
        ({"name": "a", "disabled": "yes"}, "disabled", "bool"),
        ([], None, "object"),
        (b"{", None, "JSON"),
        (b"", None, "JSON"),
        (b'{"name": "\xff"}', None, "JSON"),
    ],
)
def test_a_bad_body_is_refused_and_its_field_named(admin: AdminServer, body: Any, param: str | None, says: str) -> None:
    reply = admin.ask("POST", "/admin/keys", body)
    assert reply.status == 400
    assert reply.error["param"] == param
    assert re.search(says, reply.error["message"]), reply.error["message"]
    assert as_key(admin.ask("GET", "/admin/keys?after=conf-a&limit=1"))["data"][0]["name"] == "conf-z", "nothing made"


def test_bodies_are_json_and_small(admin: AdminServer) -> None:
    assert (
        admin.ask("POST", "/admin/keys", {"name": "a"}, content_type="text/plain").error["code"]
        == "invalid_content_type"
    )
    assert admin.ask("POST", "/admin/keys", b" " * 100_000).status == 413


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "unknown_url"),
        ("GET", "/admin", 404, "unknown_url"),
        ("PUT", "/admin/keys", 405, "method_not_allowed"),
        ("POST", "/admin/keys/alice", 405, "method_not_allowed"),
        ("GET", "/admin/keys/nobody", 404, "key_not_found"),
        ("GET", "/admin/keys/", 404, "key_not_found"),
        ("DELETE", "/admin/keys/nobody", 404, "key_not_found"),
        ("POST", "/admin/keys/nobody/rotate", 404, "key_not_found"),
        ("GET", "/admin/keys?limit=0", 400, "invalid_value"),
        ("GET", "/admin/keys?limit=501", 400, "invalid_value"),
        ("GET", "/admin/keys?limit=x", 400, "invalid_value"),
        ("GET", "/admin/keys?page=2", 400, "invalid_value"),
    ],
)
def test_every_error_is_in_openais_shape(admin: AdminServer, method: str, path: str, status: int, code: str) -> None:
    reply = admin.ask(method, path)
    assert (reply.status, reply.error["code"]) == (status, code)


def test_of_two_creations_of_a_name_exactly_one_wins(admin: AdminServer) -> None:
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: admin.ask("POST", "/admin/keys", {"name": "alice"}), range(16)))
    statuses = [reply.status for reply in replies]
    assert sorted(statuses) == [201] + [409] * 15
    assert admin.caller(replies[statuses.index(201)].json()["key"]) == "alice"
    assert {reply.error["code"] for reply in replies if reply.status == 409} == {"already_exists"}


def test_of_changes_at_the_same_time_none_is_lost(admin: AdminServer) -> None:
    admin.create("alice")
    changes: list[dict[str, Any]] = [{"team": "red"}, {"user": "u"}, {"priority": 3}, {"tags": ["x"]}]
    with ThreadPoolExecutor(4) as pool:
        assert all(
            reply.status == 200 for reply in pool.map(lambda c: admin.ask("PATCH", "/admin/keys/alice", c), changes)
        )
    shown = as_key(admin.ask("GET", "/admin/keys/alice"))
    assert (shown["team"], shown["user"], shown["priority"], shown["tags"]) == ("red", "u", 3, ["x"])


def test_a_change_changes_what_it_names_and_null_takes_away(admin: AdminServer, clock: Clock) -> None:
    key = admin.create("alice", team="red", models=["auto"], metadata={"a": "1"}, expires="2030-01-01T00:00:00Z")
    before = as_key(admin.ask("GET", "/admin/keys/alice"))
    clock.s += 60
    after = as_key(admin.ask("PATCH", "/admin/keys/alice", {"team": "blue", "models": None, "expires": None}))
    changed = {"team": "blue", "models": None, "expires": None, "changed": "2027-01-15T08:01:00Z"}
    assert after == {**before, **changed}
    assert as_key(admin.ask("PATCH", "/admin/keys/alice", {}))["team"] == "blue"
    assert admin.caller(key) == "alice"
    for body, param in [({"team": "green"}, "team"), ({"name": "bob"}, "name"), ({"disabled": None}, "disabled")]:
        reply = admin.ask("PATCH", "/admin/keys/alice", body)
        assert (reply.status, reply.error["param"]) == (400, param)


def test_a_key_is_disabled_enabled_and_ended_for_those_who_use_it(admin: AdminServer) -> None:
    key = admin.create("alice")
    assert admin.caller(key) == "alice"
    assert as_key(admin.ask("PATCH", "/admin/keys/alice", {"disabled": True}))["state"] == "disabled"
    assert "disabled" in admin.caller(key)
    assert as_key(admin.ask("PATCH", "/admin/keys/alice", {"disabled": False}))["state"] == "active"
    assert admin.caller(key) == "alice"
    assert as_key(admin.ask("PATCH", "/admin/keys/alice", {"expires": "2020-01-01T00:00:00Z"}))["state"] == "expired"
    assert "expired" in admin.caller(key)


def test_after_a_rotation_both_keys_hold_for_the_grace(redis_server: RedisServer) -> None:
    with running_admin(redis_server) as admin:
        old = admin.create("alice", team="red")
        reply = as_key(admin.ask("POST", "/admin/keys/alice/rotate", {"grace": "1h"}))
        new = reply["key"]
        assert new != old
        assert len(reply["replaced"]) == 1
        assert reply["team"] == "red"
        assert admin.caller(old) == admin.caller(new) == "alice"
        newest = as_key(admin.ask("POST", "/admin/keys/alice/rotate", {"grace": "0s"}))
        assert newest["replaced"] == []
        assert [admin.caller(key) for key in (old, new)] == ["The API key is not known here."] * 2
        assert admin.caller(newest["key"]) == "alice"


def test_the_grace_is_a_day_where_nothing_is_said_and_never_grows(admin: AdminServer, clock: Clock) -> None:
    admin.create("alice")
    rotated = as_key(admin.ask("POST", "/admin/keys/alice/rotate"))
    assert rotated["replaced"] == [{"until": "2027-01-16T08:00:00Z"}]
    rotated = as_key(admin.ask("POST", "/admin/keys/alice/rotate", {"grace": "48h"}))
    assert [one["until"] for one in rotated["replaced"]] == ["2027-01-17T08:00:00Z", "2027-01-16T08:00:00Z"]
    clock.s += 3600
    rotated = as_key(admin.ask("POST", "/admin/keys/alice/rotate", {"grace": "30m"}))
    assert {one["until"] for one in rotated["replaced"]} == {"2027-01-15T09:30:00Z"}
    clock.s += 1800
    assert as_key(admin.ask("GET", "/admin/keys/alice"))["replaced"] == []


def test_only_so_many_older_keys_hold_at_a_time(admin: AdminServer) -> None:
    admin.create("alice")
    for _ in range(8):
        assert admin.ask("POST", "/admin/keys/alice/rotate").status == 200
    reply = admin.ask("POST", "/admin/keys/alice/rotate")
    assert (reply.status, reply.error["param"]) == (400, "grace")
    assert admin.ask("POST", "/admin/keys/alice/rotate", {"grace": "0s"}).status == 200


@pytest.mark.parametrize("grace", ["", "1", "1w", "-1h", "forever", "90000h"])
def test_a_grace_is_a_duration(admin: AdminServer, grace: str) -> None:
    admin.create("alice")
    reply = admin.ask("POST", "/admin/keys/alice/rotate", {"grace": grace})
    assert (reply.status, reply.error["param"]) == (400, "grace")


def test_a_deleted_key_is_unknown_and_its_name_free(admin: AdminServer) -> None:
    key = admin.create("alice")
    assert admin.caller(key) == "alice"
    assert as_key(admin.ask("DELETE", "/admin/keys/alice")) == {"object": "key", "name": "alice", "deleted": True}
    assert "not known" in admin.caller(key)
    assert admin.caller(admin.create("alice")) == "alice"


def test_keys_of_the_configuration_are_shown_and_never_changed(admin: AdminServer) -> None:
    shown = as_key(admin.ask("GET", "/admin/keys/conf-a"))
    assert (shown["source"], shown["team"], shown["tags"], shown["metadata"]) == ("config", "red", ["old"], {"a": "1"})
    assert "a" * 64 not in str(shown)
    assert as_key(admin.ask("GET", "/admin/keys/conf-z"))["state"] == "disabled"
    assert admin.ask("POST", "/admin/keys", {"name": "conf-a"}).error["code"] == "already_exists"
    for method, path, body in [
        ("PATCH", "/admin/keys/conf-a", {"disabled": True}),
        ("POST", "/admin/keys/conf-a/rotate", {}),
        ("DELETE", "/admin/keys/conf-a", None),
    ]:
        reply = admin.ask(method, path, body)
        assert reply.status == 400
        assert "configuration" in reply.error["message"]


def listed(admin: AdminServer, query: str) -> list[list[str]]:
    """All pages of a list, as names."""
    pages, after = [], ""
    while True:
        page = as_key(admin.ask("GET", f"/admin/keys?{query}&after={after}"))
        pages.append([one["name"] for one in page["data"]])
        assert page["has_more"] == (page["next"] is not None)
        if not page["has_more"]:
            return pages
        after = page["next"]


def test_the_list_comes_in_pages_by_name_with_those_of_the_configuration(admin: AdminServer) -> None:
    for number in range(7):
        admin.create(f"k{number}", team="red" if number % 2 else "blue", tags=["even"] if number % 2 == 0 else [])
    admin.create("aa")
    everything = ["aa", "conf-a", "conf-z", *(f"k{number}" for number in range(7))]
    assert listed(admin, "limit=100") == [everything]
    assert listed(admin, "limit=4") == [everything[:4], everything[4:8], everything[8:]]
    assert listed(admin, "limit=1") == [[name] for name in everything]
    assert [name for page in listed(admin, "team=red&limit=2") for name in page] == ["conf-a", "k1", "k3", "k5"]
    assert [name for page in listed(admin, "tag=even&limit=3") for name in page] == ["k0", "k2", "k4", "k6"]
    assert [name for page in listed(admin, "tag=even&team=red") for name in page] == []


def test_names_may_have_slashes_in_them(admin: AdminServer) -> None:
    admin.create("team/alice/rotate")
    assert as_key(admin.ask("GET", "/admin/keys/team%2Falice%2Frotate"))["name"] == "team/alice/rotate"
    assert as_key(admin.ask("POST", "/admin/keys/team/alice/rotate/rotate"))["name"] == "team/alice/rotate"
    assert admin.ask("DELETE", "/admin/keys/team/alice/rotate").status == 200


def test_no_key_and_no_digest_is_ever_logged(admin: AdminServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "uvicorn.access")  # as `set_up_logging` does
    caplog.set_level(logging.DEBUG)
    keys = [admin.create("alice")]
    keys.append(as_key(admin.ask("POST", "/admin/keys/alice/rotate"))["key"])
    for key in keys:
        admin.caller(key)
        admin.ask("GET", f"/admin/keys/{key}")
        admin.ask("DELETE", f"/admin/keys/{key}")
        admin.ask("POST", "/admin/keys", {"name": key})
        admin.ask("GET", "/admin/keys", key=key)
        admin.ask("GET", f"/{key}")
    admin.ask("PATCH", "/admin/keys/alice", {"disabled": True})
    admin.ask("DELETE", "/admin/keys/alice")
    told = caplog.text
    for word in ("alice was created", "alice was rotated", "alice was changed (now disabled)", "alice was deleted"):
        assert word in told
    for key in (*keys, ADMIN_KEY):
        assert key not in told
        assert digest_of(key) not in told


def test_a_store_that_is_gone_is_told_as_such() -> None:
    with running_redis() as redis, running_admin(redis) as admin:
        admin.create("alice")
        redis_port = redis.port
        with socket.create_connection(("127.0.0.1", redis_port)) as connection:
            connection.sendall(f"AUTH {redis.password}\r\nSHUTDOWN NOSAVE\r\n".encode())
            while connection.recv(64):
                pass
        for method, path, body in [("GET", "/admin/keys", None), ("POST", "/admin/keys", {"name": "bob"})]:
            reply = admin.ask(method, path, body)
            assert (reply.status, reply.error["code"]) == (503, "keys_unavailable")
            assert int(reply.headers["retry-after"]) >= 1
