"""What can be typed? `tierway` and its commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from backends.weights import local_model_ids
from gateway import __version__
from gateway.config.document import schema
from gateway.config.load import ConfigError, Loaded, load
from gateway.config.problem import Problem, in_order
from gateway.config.readiness import check as check_readiness
from gateway.config.secrets import check as check_secrets
from gateway.key_store import digest_of, new_key

_EPILOG = """\
examples:
  tierway check                         find every mistake in gateway.yaml
  tierway serve                         serve what gateway.yaml describes
  tierway keygen --name alice           make an API key and the lines to paste
  echo '{"model":"auto","messages":[{"role":"user","content":"Hi"}]}' | tierway explain -
"""

_TOOLS = {
    "models": "list the local models with source and licence, or fetch them",
    "keys": "make, list and change keys of the store, through the admin API",
    "limits": "tell a store that has lost its data what budgets had spent",
    "cost": "say what was spent, by whom, where and what for",
    "ledger": "verify, seed, prune and export the ledger, compare it with an invoice",
}
"""The commands with a module of their own in `gateway/tools/`."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    options = _parser(next(iter(words), None)).parse_args(words)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except ConfigError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        count = len(error.problems)
        print(f"{count} problem{'s' if count != 1 else ''} found.", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"tierway: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntierway: interrupted. What was downloaded is kept.", file=sys.stderr)
        return 130


def _parser(asked: str | None) -> argparse.ArgumentParser:
    """Return what can be typed; in full of the command that was `asked`."""
    parser = argparse.ArgumentParser(
        prog="tierway",
        description="One OpenAI endpoint over models of several sizes: the cheapest that is confident enough answers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tierway {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    serve = _command(commands, "serve", _serve, "serve requests until told to stop")
    serve.add_argument("--host", help="address to listen on (default: server.host of the file)")
    serve.add_argument(
        "--port", type=int, help="port to listen on, 0 for a free one (default: server.port of the file)"
    )
    serve.add_argument(
        "--workers", type=_positive, help="processes that share the port (default: server.workers of the file)"
    )
    check = _command(commands, "check", _check, "find every mistake in the configuration, each with file:line:column")
    check.add_argument(
        "--workers", type=_positive, help="as of tierway serve: some settings are for one process (default: as there)"
    )
    explain = _command(commands, "explain", _explain, "show where a request would go and why; nothing is sent")
    explain.add_argument("request", help="file with the JSON body of a request, - for standard input")
    explain.add_argument("--key", help="name of a key whose permissions and limits hold (default: all is permitted)")
    _command(commands, "schema", _schema, "print the JSON Schema of gateway.yaml, for editors", config=False)
    keygen = _command(commands, "keygen", _keygen, "make an API key; only its digest goes into the file", config=False)
    keygen.add_argument("--name", default="new-key", help="what logs and Decisions will call it (default: new-key)")
    _command(commands, "doctor", _doctor, "look at packages, versions, the port and the backends")
    for name, what in _TOOLS.items():
        tool = commands.add_parser(name, help=what)
        if asked == name:
            # Every command loads its own tool, and nobody else's.
            module = import_module(f"gateway.tools.{name}")
            module.add_arguments(tool)
            if hasattr(module, "run"):
                tool.set_defaults(run=module.run)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    what: str,
    *,
    config: bool = True,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
    parser.set_defaults(run=run)
    if config:
        parser.add_argument(
            "--config", type=Path, default=Path("gateway.yaml"), metavar="FILE", help="default: gateway.yaml"
        )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 255:
        raise argparse.ArgumentTypeError("from 1 to 255")
    return number


def _loaded(options: argparse.Namespace) -> Loaded:
    return load(options.config, local_model_ids=local_model_ids())


def _workers(options: argparse.Namespace, loaded: Loaded) -> int:
    return loaded.config.server.workers if options.workers is None else int(options.workers)


def _unready(loaded: Loaded, workers: int) -> tuple[Problem, ...]:
    return in_order([*check_secrets(loaded), *check_readiness(loaded, workers=workers)])


def _serve(options: argparse.Namespace) -> int:
    loaded = _loaded(options)
    for warning in loaded.warnings:
        print(f"{warning} (warning)", file=sys.stderr)
    server = loaded.config.server
    if problems := _unready(loaded, _workers(options, loaded)):
        raise ConfigError(problems)
    from gateway.serve import serve  # noqa: PLC0415 - only this command needs the server, and only for a good file

    serve(
        loaded,
        workers=_workers(options, loaded),
        host=server.host if options.host is None else options.host,
        port=server.port if options.port is None else options.port,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return 0


def _check(options: argparse.Namespace) -> int:
    loaded = _loaded(options)
    for warning in loaded.warnings:
        print(f"{warning} (warning)")
    if problems := _unready(loaded, _workers(options, loaded)):
        raise ConfigError(problems)
    print(f"{options.config}: fine. Configuration {loaded.digest}.")
    return 0


def _explain(options: argparse.Namespace) -> int:
    from gateway.tools import explain  # noqa: PLC0415

    return explain.run(_loaded(options), options.request, options.key)


def _schema(_options: argparse.Namespace) -> int:
    import msgspec  # noqa: PLC0415

    print(msgspec.json.format(msgspec.json.encode(schema()), indent=2).decode())
    return 0


def _keygen(options: argparse.Namespace) -> int:
    key = new_key()
    print(f"The key, shown this once:\n\n  {key}\n\nBelow 'keys:' in gateway.yaml:\n")
    print(f"  - name: {options.name}\n    sha256: {digest_of(key)}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from gateway.tools import doctor  # noqa: PLC0415

    try:
        loaded: Loaded | None = _loaded(options)
    except ConfigError as error:
        print(f"BAD configuration: {len(error.problems)} problems; 'tierway check' lists them.")
        loaded = None
    return doctor.run(loaded) or int(loaded is None)


if __name__ == "__main__":
    sys.exit(main())
