"""Does PostgreSQL keep every row that was acknowledged, once, and is nobody held up when it does not answer?"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Iterator
from time import monotonic

import hypothesis.strategies as st
import msgspec
import psycopg
import pytest
from hypothesis import given, settings

from gateway.ledger import schema as tables
from gateway.ledger.contract import BadRows, LedgerDown
from gateway.ledger.postgres import PostgresStore
from gateway.ledger.postgres_line import Address
from gateway.ledger.rows import AnyRow, InstanceRow, RefusalRow
from tests.gateway.ledger.bills import bill_of, billed, id_of, left_open, open_row, rows_of
from tests.servers.fixtures import cannot_run
from tests.servers.postgres import Cluster, PostgresServer, frozen, made_cluster
from tests.servers.process import ServerMissingError
from tests.servers.redis import free_port
from tests.servers.relay import CERTIFICATE, KEY, SERVER_NAME, relay_to

SCHEMAS = itertools.count()
SOON_S = 0.3
NOT_LONG_S = 3.0
PATIENT_S = 20.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    try:
        with made_cluster(port=free_port()) as made:
            yield made
    except ServerMissingError as missing:
        cannot_run(missing)


@pytest.fixture
def server(cluster: Cluster) -> Iterator[PostgresServer]:
    """A server that may be killed."""
    yield cluster.start()
    cluster.stop()


def new_schema() -> str:
    return f"ledger {next(SCHEMAS)}"


@contextlib.contextmanager
def opened(url: str, *, schema: str | None = None, timeout_s: float = PATIENT_S) -> Iterator[PostgresStore]:
    with contextlib.closing(PostgresStore(url, schema=schema or new_schema(), timeout_s=timeout_s)) as store:
        yield store


@pytest.fixture
def store(postgres_server: PostgresServer) -> Iterator[PostgresStore]:
    with opened(postgres_server.url) as made:
        yield made


def test_rows_come_back_as_they_were(store: PostgresStore) -> None:
    bill = bill_of(1, attempts=2, inputs=True)
    exchange = msgspec.structs.replace(
        bill.exchange, user_name='Zoë "%s" \\u0041 \U0001f600\n', output_nusd=2**63 - 1, confidence=1 / 3, asked="?"
    )
    written: list[AnyRow] = [*bill.prices, exchange, *bill.attempts, *([bill.inputs] if bill.inputs else [])]
    store.write(written)
    with store.reading() as reading:
        for row in written:
            found = list(reading.rows(f"SELECT {', '.join(row.__struct_fields__)} FROM {row.TABLE}"))
            assert msgspec.structs.astuple(row) in found
            assert len(found) == sum(type(one) is type(row) for one in written)


@pytest.mark.parametrize("size", [0, 1, 255])
def test_bytes_are_bytes(store: PostgresStore, size: int) -> None:
    inputs = bill_of(1, inputs=True).inputs
    assert inputs is not None
    features = bytes(range(256))[:size]
    store.write([msgspec.structs.replace(inputs, features=features)])
    with store.reading() as reading:
        assert list(reading.rows("SELECT features FROM decision_inputs")) == [(features,)]


def test_text_that_no_database_keeps_is_marked(store: PostgresStore) -> None:
    names = ["a\0b", "a\ud83db", "a\ud83d\ude00b", "a\\u0000b"]
    rows = [msgspec.structs.replace(bill_of(n).exchange, user_name=name) for n, name in enumerate(names)]
    store.write(rows, closed=["no\0such", "no\udc00such"])
    with store.reading() as reading:
        found = [name for (name,) in reading.rows("SELECT user_name FROM exchanges ORDER BY exchange_id")]
    assert found == ["a\ufffdb", "a\ufffdb", "a\U0001f600b", "a\\u0000b"]


@pytest.mark.parametrize("number", [2**63, 2**64, 10**40])
def test_a_number_that_is_too_large_is_the_fault_of_the_row(store: PostgresStore, number: int) -> None:
    bad = msgspec.structs.replace(bill_of(1).exchange, output_nusd=number)
    with pytest.raises(BadRows):
        store.write([*rows_of(bill_of(2)), bad])
    assert billed(store) == {}
    store.write(rows_of(bill_of(2)))
    assert set(billed(store)) == {id_of(2)}


def test_a_key_that_no_index_takes_is_the_fault_of_the_row(store: PostgresStore) -> None:
    noise = "".join(chr(0x4E00 + hash((n, 7)) % 20000) for n in range(5000))
    with pytest.raises(BadRows, match="index row"):
        store.write([RefusalRow(hour=1, instance="here", key_name=noise, code="x", requests=1)])


def test_an_open_exchange_that_is_closed_at_once_is_gone(store: PostgresStore) -> None:
    store.write([open_row(1), open_row(2), open_row(3)])
    store.write([open_row(2), open_row(4), *rows_of(bill_of(2))], closed=[id_of(2), id_of(3), id_of(4)])
    assert left_open(store) == {id_of(1)}


@st.composite
def batches(draw: st.DrawFn) -> list[list[AnyRow]]:
    row: st.SearchStrategy[AnyRow] = st.one_of(
        st.builds(lambda n, lost, out: bill_of(n, lost=lost, output=out).exchange, st.integers(0, 2), st.booleans(),
                  st.integers(0, 3)),
        st.builds(lambda n, seen: open_row(n, seen_ms=seen), st.integers(0, 2), st.integers(0, 3)),
        st.builds(lambda heard: InstanceRow(instance="here", heard_ms=heard), st.integers(0, 5)),
    )  # fmt: skip
    return draw(st.lists(st.lists(row, max_size=6), max_size=4))


def test_a_batch_is_as_good_as_its_rows_one_by_one(postgres_server: PostgresServer) -> None:
    names, schemas = ("exchanges", "open_exchanges", "instances"), ("together", "apart")
    with (
        opened(postgres_server.url, schema="together") as together,
        opened(postgres_server.url, schema="apart") as apart,
        psycopg.connect(postgres_server.url, autocommit=True) as link,
    ):
        together.write([])
        apart.write([])

        @settings(max_examples=25)
        @given(batches())
        def holds(some: list[list[AnyRow]]) -> None:
            for schema, name in itertools.product(schemas, names):
                link.execute(f"DELETE FROM {schema}.{name}".encode())
            for batch in some:
                together.write(batch)
                for row in batch:
                    apart.write([row])
            for name in names:
                first, second = (
                    link.execute(f"SELECT * FROM {schema}.{name} ORDER BY 1".encode()) for schema in schemas
                )
                assert first.fetchall() == second.fetchall()

        holds()


def test_reading_is_of_one_moment_and_queries_may_be_nested(store: PostgresStore) -> None:
    store.write([bill_of(n).exchange for n in range(3000)])
    with store.reading() as reading:
        outer = reading.rows("SELECT exchange_id FROM exchanges ORDER BY 1")
        first = next(outer)
        store.write([bill_of(5000).exchange])
        inner = list(reading.rows("SELECT COUNT(*) FROM exchanges WHERE exchange_id > ?", first))
        assert inner == [(2999,)]
        assert len(list(outer)) == 2999
        abandoned = reading.rows("SELECT exchange_id FROM exchanges")
        next(abandoned)
    assert len(billed(store)) == 3001


def test_values_are_of_the_kinds_that_sqlite_gives(store: PostgresStore) -> None:
    store.write([msgspec.structs.replace(bill_of(n).exchange, output_nusd=2**62) for n in range(4)])
    with store.reading() as reading:
        sql = "SELECT SUM(output_nusd), AVG(calls), COUNT(*) > 3, '?%', 5 / 2, 0.5, MIN(confidence) FROM exchanges"
        (row,) = reading.rows(sql)
    assert row == (2**64, 1.0, 1, "?%", 2, 0.5, 0.875)
    assert [type(value) for value in row] == [int, float, int, str, int, float, float]


def test_a_change_may_take_longer_than_a_write(store: PostgresStore) -> None:
    store.write([bill_of(n).exchange for n in range(3)])
    store.close()  # the next connection has the other limit
    store._timeout_s = SOON_S
    while store._link is None:
        with contextlib.suppress(LedgerDown):
            store.write([])
    slow = ("DELETE FROM exchanges WHERE exchange_id = ? AND pg_sleep(?) IS NOT NULL", (id_of(1), 3 * SOON_S))
    store.change([slow, ("DELETE FROM exchanges WHERE exchange_id = ?", (id_of(2),))])
    assert set(billed(store)) == {id_of(0)}
    with pytest.raises(LedgerDown):
        store.change([("DELETE FROM exchanges", ()), ("DELETE FROM no_such_table", ())])
    store._timeout_s = PATIENT_S
    store.write([])
    assert set(billed(store)) == {id_of(0)}


def test_nobody_writes_through_a_reading(store: PostgresStore) -> None:
    store.write(rows_of(bill_of(1)))
    with pytest.raises(LedgerDown, match="read-only"), store.reading() as reading:
        list(reading.rows("DELETE FROM exchanges RETURNING 1"))
    with pytest.raises(LedgerDown, match="no_such_table"), store.reading() as reading:
        list(reading.rows("SELECT 1 FROM no_such_table"))


def test_one_of_many_replicas_makes_the_schema(postgres_server: PostgresServer) -> None:
    schema, start, faults = new_schema(), threading.Barrier(8), []

    def replica(number: int) -> None:
        with opened(postgres_server.url, schema=schema) as one:
            start.wait()
            try:
                one.write(rows_of(bill_of(number)))
            except LedgerDown as fault:
                faults.append(fault)

    threads = [threading.Thread(target=replica, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    with opened(postgres_server.url, schema=schema) as one:
        assert len(billed(one)) == 8
        with one.reading() as reading:
            versions = [version for (version,) in reading.rows("SELECT version FROM schema_version")]
    assert versions == [migration.version for migration in tables.migrations()]


def test_a_newer_schema_is_refused(postgres_server: PostgresServer) -> None:
    schema = new_schema()
    with opened(postgres_server.url, schema=schema) as one:
        one.write([])
    with psycopg.connect(postgres_server.url, autocommit=True) as link:
        link.execute(f'INSERT INTO "{schema}".schema_version VALUES (999, 0)'.encode())
    with opened(postgres_server.url, schema=schema) as one:
        with pytest.raises(LedgerDown, match="version 999"):
            one.write(rows_of(bill_of(1)))
        with pytest.raises(LedgerDown, match="version 999"), one.reading():
            pytest.fail("it cannot be read")


def test_rows_that_newer_tables_refuse_are_not_bad(postgres_server: PostgresServer) -> None:
    schema = new_schema()
    with opened(postgres_server.url, schema=schema) as one:
        one.write([])
        with psycopg.connect(postgres_server.url, autocommit=True) as link:
            link.execute(f'ALTER TABLE "{schema}".exchanges ADD COLUMN colour TEXT NOT NULL'.encode())
            with pytest.raises(BadRows):
                one.write([bill_of(1).exchange])
            link.execute(f'INSERT INTO "{schema}".schema_version VALUES (999, 0)'.encode())
        with pytest.raises(LedgerDown, match="version 999") as caught:
            one.write([bill_of(1).exchange])
        assert not isinstance(caught.value, BadRows)


def test_a_schema_that_is_not_there_is_not_made_by_a_reader(postgres_server: PostgresServer) -> None:
    with opened(postgres_server.url) as one, pytest.raises(LedgerDown, match="no schema yet"), one.reading():
        pytest.fail("it cannot be read")


def test_one_leads_and_when_it_is_gone_another(postgres_server: PostgresServer) -> None:
    schema = new_schema()
    with opened(postgres_server.url, schema=schema) as one, opened(postgres_server.url, schema=schema) as other:
        one.write([])
        with one.leading("closing") as first, other.leading("closing") as second, other.leading("other") as third:
            assert (first, second, third) == (True, False, True)
        with other.leading("closing") as second:
            assert second


def test_a_role_without_rights_is_told_so(postgres_server: PostgresServer) -> None:
    with psycopg.connect(postgres_server.url, autocommit=True) as link:
        link.execute("CREATE ROLE stranger LOGIN")
        try:
            with (
                opened(postgres_server.url.replace("postgres@", "stranger@")) as one,
                pytest.raises(LedgerDown, match="permission denied for database postgres"),
            ):
                one.write([])
        finally:
            link.execute("DROP ROLE stranger")


def test_a_role_that_may_only_use_its_schema_is_enough(postgres_server: PostgresServer) -> None:
    schema = new_schema()
    with psycopg.connect(postgres_server.url, autocommit=True) as link:
        link.execute("CREATE ROLE clerk LOGIN")
        link.execute(f'CREATE SCHEMA "{schema}" AUTHORIZATION clerk'.encode())
        try:
            with opened(postgres_server.url.replace("postgres@", "clerk@"), schema=schema) as one:
                one.write(rows_of(bill_of(1)))
                assert len(billed(one)) == 1
        finally:
            link.execute("DROP OWNED BY clerk")
            link.execute("DROP ROLE clerk")


def test_a_commit_is_durable_even_where_the_role_says_otherwise(postgres_server: PostgresServer) -> None:
    with psycopg.connect(postgres_server.url, autocommit=True) as link:
        link.execute("CREATE ROLE hasty LOGIN SUPERUSER")
        link.execute("ALTER ROLE hasty SET synchronous_commit = off")
        try:
            with opened(postgres_server.url.replace("postgres@", "hasty@")) as one:
                one.write([])
                assert one._link is not None
                assert one._link.execute("SHOW synchronous_commit").fetchone() == ("on",)
        finally:
            link.execute("DROP OWNED BY hasty")
            link.execute("DROP ROLE hasty")


def test_a_database_that_is_not_there_is_told(postgres_server: PostgresServer) -> None:
    url = postgres_server.url.replace("/postgres?", "/nowhere?")
    with opened(url) as one, pytest.raises(LedgerDown, match='database "nowhere" does not exist'):
        one.write([])


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://me:s3cret/x@host/db",
        "postgresql://me:s3cret@x@host/db",
        "postgresql://me:s3cret:x@host:y/db",
        "host=here password='s3cret",
        "s3cret",
    ],
)
def test_an_address_that_cannot_be_read_is_not_shown(dsn: str) -> None:
    with pytest.raises(ValueError, match="cannot be read") as caught:
        PostgresStore(dsn)
    assert "s3cret" not in f"{caught.value} {caught.value.__context__}"


def test_a_password_that_a_message_repeats_is_not_shown() -> None:
    words = Address("postgresql://me:s3cret@host/db").words(psycopg.OperationalError("no entry for\n  me, s3cret, db"))
    assert words == "no entry for me, ***, db"


def test_a_wrong_password_is_not_shown(server: PostgresServer) -> None:
    assert server.port is not None
    url = server.url_by(server.port).replace(server.password, "s3cret-s3cret")
    with opened(url) as one:
        with pytest.raises(LedgerDown, match="password authentication failed") as caught:
            one.write([])
        with pytest.raises(LedgerDown) as read, one.reading():
            pytest.fail("it has the wrong password")
    assert "s3cret" not in f"{caught.value} {read.value}"


def test_tls_is_spoken_as_the_address_says() -> None:
    files = ("ssl_cert_file=certificate.pem", "ssl_key_file=key.pem")
    try:
        with made_cluster("ssl=on", *files, port=free_port()) as there:
            owner = there.data.stat()
            for path in (CERTIFICATE, KEY):
                target = there.data / path.name
                target.write_bytes(path.read_bytes())
                target.chmod(0o600)
                os.chown(target, owner.st_uid, owner.st_gid)
            server = there.start()
            told = f"hostaddr=127.0.0.1 port={server.port} user=postgres password={server.password} dbname=postgres"
            told += f" sslmode=verify-full sslrootcert={CERTIFICATE}"
            with opened(f"{told} host={SERVER_NAME}") as one:
                one.write([])
                assert one._link is not None
                assert one._link.pgconn.ssl_in_use
            with opened(f"{told} host=another.test") as one, pytest.raises(LedgerDown, match="does not match"):
                one.write([])
    except ServerMissingError as missing:
        cannot_run(missing)


def test_no_server_is_told_at_once() -> None:
    with opened(f"postgresql://me:s3cret@127.0.0.1:{free_port()}/db") as one:
        with pytest.raises(LedgerDown, match="Connection refused") as caught:
            one.write([])
        with pytest.raises(LedgerDown, match="Connection refused"), one.reading():
            pytest.fail("there is nobody")
    assert "s3cret" not in str(caught.value)


def took(store: PostgresStore, rows: list[AnyRow], why: str = ".") -> float:
    begun = monotonic()
    with pytest.raises(LedgerDown, match=why):
        store.write(rows)
    return monotonic() - begun


@pytest.mark.parametrize("size", [1, 5000])
def test_a_frozen_server_holds_nobody_up(server: PostgresServer, size: int) -> None:
    """The larger batch does not fit into the socket: we are still sending when nobody reads any more."""
    schema = new_schema()
    with opened(server.url, schema=schema) as one:
        one.write([])
    with opened(server.url, schema=schema, timeout_s=SOON_S) as one:
        while one._link is None:
            with contextlib.suppress(LedgerDown):
                one.write([])
        rows = [row for n in range(size) for row in rows_of(bill_of(n))]
        with frozen(server):
            assert SOON_S * 0.9 < took(one, rows, "does not answer") < NOT_LONG_S
            assert took(one, rows, "does not answer") < NOT_LONG_S  # connecting, too
        one._timeout_s = PATIENT_S
        one.write(rows)
        assert len(billed(one)) == size


def test_a_firewall_that_drops_packets_holds_nobody_up(server: PostgresServer) -> None:
    assert server.port is not None
    with relay_to(server.port) as relay, opened(server.url_by(relay.port)) as one:
        one.write(rows_of(bill_of(1)))
        one._timeout_s = SOON_S
        relay.deaf = True
        assert SOON_S * 0.9 < took(one, rows_of(bill_of(2))) < NOT_LONG_S
        assert took(one, rows_of(bill_of(2))) < NOT_LONG_S
        relay.deaf = False
        one.close()
        one._timeout_s = PATIENT_S
        one.write(rows_of(bill_of(3)))
        assert {id_of(1), id_of(3)} <= set(billed(one))


def test_what_was_given_up_cannot_come_later(server: PostgresServer) -> None:
    """A session that waits for a lock when we give it up is gone when the next one writes."""
    schema = new_schema()
    with opened(server.url, schema=schema) as one, psycopg.connect(server.url) as blocker:
        one.write([])
        assert one._link is not None
        blocker.execute(f'LOCK TABLE "{schema}".exchanges'.encode())
        first = one._link.session
        one._link.execute("SET statement_timeout = 0; SET lock_timeout = 0")
        one._timeout_s = SOON_S
        took(one, rows_of(bill_of(1)))
        ask = "SELECT pid FROM pg_stat_activity WHERE backend_start::text = %s"
        assert blocker.execute(ask, (first.started,)).fetchall() == [(first.pid,)]
        one._timeout_s = PATIENT_S
        one.write([])
        blocker.execute("SELECT pg_stat_clear_snapshot()")
        assert blocker.execute(ask, (first.started,)).fetchall() == []
        blocker.rollback()
        assert billed(one) == {}


def test_a_restart_in_between_is_not_noticed(cluster: Cluster, server: PostgresServer) -> None:
    with opened(server.url) as one:
        one.write(rows_of(bill_of(1)))
        cluster.stop()
        cluster.start()
        one.write(rows_of(bill_of(2)))
        cluster.kill()
        cluster.start()
        one.write(rows_of(bill_of(3)))
        assert set(billed(one)) == {id_of(1), id_of(2), id_of(3)}


def test_one_that_became_a_standby_is_left(server: PostgresServer) -> None:
    with opened(server.url) as one:
        one.write(rows_of(bill_of(1)))
        with psycopg.connect(server.url, autocommit=True) as link:
            link.execute("ALTER SYSTEM SET default_transaction_read_only = on")
            link.execute("SELECT pg_reload_conf()")

            def write_on() -> None:
                while True:  # each connection hears of it when it hears of it
                    one.write(rows_of(bill_of(1)))

            with pytest.raises(LedgerDown, match="read-only"):
                write_on()
            link.execute("SET default_transaction_read_only = off")
            link.execute("ALTER SYSTEM RESET default_transaction_read_only")
            link.execute("SELECT pg_reload_conf()")
        while True:
            with contextlib.suppress(LedgerDown):
                one.write(rows_of(bill_of(2)))
                break
        assert set(billed(one)) == {id_of(1), id_of(2)}


def test_too_many_connections_are_told(postgres_server: PostgresServer) -> None:
    with psycopg.connect(postgres_server.url, autocommit=True) as link:
        link.execute("CREATE ROLE few LOGIN CONNECTION LIMIT 0")
        try:
            with (
                opened(postgres_server.url.replace("postgres@", "few@")) as one,
                pytest.raises(LedgerDown, match="too many connections"),
            ):
                one.write([])
        finally:
            link.execute("DROP ROLE few")


def test_what_was_acknowledged_is_there_once_after_many_kills(cluster: Cluster, server: PostgresServer) -> None:
    """Four replicas write while the server is killed and started again; what fails is written again by the replica."""
    schema, done, acknowledged = new_schema(), threading.Event(), [0] * 4
    with opened(server.url, schema=schema) as first:
        first.write([])

    def replica(number: int) -> None:
        with opened(server.url, schema=schema, timeout_s=5.0) as one:
            while not done.is_set():
                bill = bill_of(number * 1_000_000 + acknowledged[number], attempts=2)
                with contextlib.suppress(LedgerDown):
                    one.write(rows_of(bill))
                    acknowledged[number] += 1

    threads = [threading.Thread(target=replica, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        before = sum(acknowledged)
        while sum(acknowledged) < before + 60:
            done.wait(0.005)
        cluster.kill()
        cluster.start()
    done.set()
    for thread in threads:
        thread.join()
    with opened(server.url, schema=schema) as one:
        there = set(billed(one))
        with one.reading() as reading:
            ((attempts,),) = reading.rows("SELECT COUNT(*) FROM attempts")
    expected = {id_of(number * 1_000_000 + n) for number in range(4) for n in range(acknowledged[number])}
    assert expected <= there
    assert len(there - expected) <= 4  # one in flight each, whose answer did not come
    assert attempts == 2 * len(there)
