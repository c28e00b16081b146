"""How does a test ask for a real server? By the name of a fixture.

Where a server is not to be had the test is skipped and says why; in CI it fails, because there a skipped test would be
taken for a passed one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.servers.postgres import PostgresServer, running_postgres
from tests.servers.process import ServerMissingError
from tests.servers.redis import RedisServer, running_redis


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One Redis for all tests; who needs it empty flushes it, who needs it to die starts one of their own."""
    try:
        with running_redis() as server:
            yield server
    except ServerMissingError as missing:
        cannot_run(missing)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One PostgreSQL for all tests; each makes the tables or the database that it needs."""
    try:
        with running_postgres() as server:
            yield server
    except ServerMissingError as missing:
        cannot_run(missing)


def cannot_run(why: ServerMissingError) -> None:
    """Skip the test, or fail it in CI."""
    if os.environ.get("CI"):
        pytest.fail(f"in CI every server must be there: {why}")
    pytest.skip(str(why))
