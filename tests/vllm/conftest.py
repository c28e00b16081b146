"""When do these tests run? Only where the address of a running vLLM is given; elsewhere they are not even collected."""

from __future__ import annotations

import os

import pytest

from tests.vllm import ADDRESS_VARIABLE

collect_ignore_glob = [] if ADDRESS_VARIABLE in os.environ else ["test_*.py"]


@pytest.fixture(scope="session")
def vllm_address() -> str:
    """Where the server listens, without a path."""
    return os.environ[ADDRESS_VARIABLE]
