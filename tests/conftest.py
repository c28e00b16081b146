"""Which fixtures does every test find? Those named here."""

from __future__ import annotations

pytest_plugins = ("tests.servers.fixtures",)
