"""The command line: `pke-fast COMMAND`. Bad input exits with 2, an interruption with 130, any other failure with 1."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    try:
        # Imported here, so that Ctrl-C while it happens is caught like any other.
        from pke_fast.cli.parser import build_parser
        from pke_fast.errors import PKEError

        options = build_parser().parse_args(arguments)
        try:
            options.run(options)
            sys.stdout.flush()
        except PKEError as error:
            print(f"pke-fast: {error}", file=sys.stderr)
            return error.exit_status
        except BrokenPipeError:  # whoever read our output has enough of it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
    except KeyboardInterrupt:
        print("pke-fast: interrupted; nothing half-made was left", file=sys.stderr)
        return INTERRUPTED
    return 0
