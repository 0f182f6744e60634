"""The command line: `pke-fast COMMAND`. Bad input exits with 2, an interruption with 130, any other failure with 1."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pke_fast.cli.parser import build_parser
from pke_fast.errors import PKEError

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except PKEError as error:
        print(f"pke-fast: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("pke-fast: interrupted; nothing half-made was left", file=sys.stderr)
        return INTERRUPTED
    return 0
