"""Which real model may a test use? The small one, from the cache or fetched; without it CI fails and others skip."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import NoReturn

import pytest

from backends.weights import WeightsUnavailable, resolve


def small_model_path() -> Path:
    """Return the file of the small model.

    Where it or its server cannot be had, the test fails in CI (`CI` is set) and is skipped elsewhere, with the reason.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        _without("xllamacpp is not installed (the extra `local` brings it)")
    try:
        return resolve("small").path
    except WeightsUnavailable as why:
        _without(str(why))


def _without(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
