"""Is a real vLLM still what the recordings say? `make test-vllm`; not part of `make test`."""

from __future__ import annotations

ADDRESS_VARIABLE = "TIERWAY_TEST_VLLM"
MODEL = "smollm2-135m"
