"""Which fixtures does every test find, and how patient is a property test? The same everywhere."""

from __future__ import annotations

import hypothesis

pytest_plugins = ("tests.servers.fixtures",)

# A shared machine pauses for longer than an example may take by default; what is slow is found by `make bench`.
hypothesis.settings.register_profile("tierway", deadline=None)
hypothesis.settings.load_profile("tierway")
