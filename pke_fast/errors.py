"""The errors that pke_fast raises on purpose, each with the exit status that the command line gives for it."""

from __future__ import annotations


class PKEError(Exception):
    """Something went wrong that the user should read about without a traceback.

    Args:
        what: one sentence that names what is wrong.
        expected: what would have been right.
        got: what came instead.
        do: what to do about it.
    """

    exit_status = 1

    def __init__(
        self, what: str, *, expected: str | None = None, got: str | None = None, do: str | None = None
    ) -> None:
        self.what, self.expected, self.got, self.do = what, expected, got, do
        parts = [("expected", expected), ("got", got), ("do", do)]
        super().__init__("\n".join([what, *(f"  {name}: {text}" for name, text in parts if text)]))


class InputError(PKEError, ValueError):
    """The input (a file, a setting, a model, a patch) can't be used; nothing was changed or written."""

    exit_status = 2


class PatchError(InputError):
    """A patch is damaged, or was made for other weights than these."""


class EditError(PKEError):
    """An edit failed on the way; the weights were put back."""
