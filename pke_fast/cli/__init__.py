"""The command line: `pke-fast COMMAND`. Bad input exits with 2, an interruption with 130, any other failure with 1."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    try:
        # Imported here, so that Ctrl-C while it happens is caught like any other.
        from pke_fast.cli.parser import build_parser
        from pke_fast.errors import PKEError

        options = build_parser().parse_args(arguments)
        try:
            with _ended_by_signals():
                options.run(options)
            if sys.stdout is not None:  # it may have been closed
                sys.stdout.flush()
        except PKEError as error:
            print(f"pke-fast: {error}", file=sys.stderr)
            return error.exit_status
        except BrokenPipeError:  # whoever read our output has enough of it
            _output_goes_nowhere()
            return 1
        except OSError as error:
            if error.filename is not None or error.errno != errno.ENOSPC:
                raise
            _output_goes_nowhere()
            print("pke-fast: no space left for what is written, on standard output or in a file", file=sys.stderr)
            return 1
    except KeyboardInterrupt as error:
        print("pke-fast: interrupted; nothing half-made was left", file=sys.stderr)
        return error.status if isinstance(error, _Ended) else INTERRUPTED
    return 0


class _Ended(KeyboardInterrupt):
    """A signal that ends a process, taken as Ctrl-C is: what was begun is put back."""

    def __init__(self, number: int) -> None:
        self.status = 128 + number


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """While it lasts, SIGTERM and SIGHUP raise; unless someone else listens to them or they are ignored."""

    def end(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough: what follows is cleaning up
        raise _Ended(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _output_goes_nowhere() -> None:
    """So that Python, at its end, doesn't try to write what is left."""
    if sys.stdout is None:
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
