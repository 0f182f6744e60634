"""Answers kept as they are made, so that an evaluation that was killed goes on where it was.

One JSON object a line: ``{"key", "prompt", "answer"}``. The key is a SHA-256 over everything that an answer depends on,
so answers of other weights, settings or prompts in the same file are never taken for one's own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pke_fast.errors import InputError
from pke_fast.files import explained_write
from pke_fast.placement import stored_names, stored_weight


class KeptAnswers:
    """A file of answers that grows by a batch at a time.

    Args:
        path: the file; it and its folder are made with the first answer.
        identity: JSON values that every answer depends on besides its prompt.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._identity = json.dumps(identity, sort_keys=True)
        self._gap = b""  # after a kill the last line may be torn: what follows must not become part of it
        self._answers = self._read()

    def known(self, prompts: Sequence[Sequence[int]]) -> dict[int, str]:
        """The answers that are there, by the prompt's index. Prompts are token ids."""
        found = ((index, self._answers.get(self._key(ids))) for index, ids in enumerate(prompts))
        return {index: answer for index, answer in found if answer is not None}

    def keep(self, prompts: Sequence[tuple[Sequence[int], str]], answers: Sequence[str]) -> None:
        """Appends answers and waits until they are on the disk.

        Args:
            prompts: token ids and text of each prompt.

        Raises:
            InputError, PKEError: the file can't be written.
        """
        rows = [
            {"key": self._key(ids), "prompt": text, "answer": answer}
            for (ids, text), answer in zip(prompts, answers, strict=True)
        ]
        with explained_write(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(self._gap + b"".join(json.dumps(row).encode() + b"\n" for row in rows))
                file.flush()
                os.fsync(file.fileno())
        self._gap = b""
        self._answers |= {row["key"]: row["answer"] for row in rows}

    def _key(self, ids: Sequence[int]) -> str:
        return hashlib.sha256(f"{self._identity}\n{json.dumps(list(ids))}".encode()).hexdigest()

    def _read(self) -> dict[str, str]:
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise InputError(
                f"can't read {self.path}", got=error.strerror, do="check the file, or remove it"
            ) from error
        self._gap = b"\n" if lines[-1] else b""
        found = {}
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # blank, or torn by a kill: that answer is made anew
                continue
            if isinstance(row, dict) and isinstance(row.get("key"), str) and isinstance(row.get("answer"), str):
                found[row["key"]] = row["answer"]
        return found


def unfinished(folder: str | Path) -> Path:
    """Where an evaluation that is to become `folder` keeps its answers until it is complete: beside it."""
    folder = Path(os.path.realpath(folder))
    return folder.with_name(f"{folder.name}.unfinished.jsonl")


def weights_digest(model: Any) -> str:
    """SHA-256, in hex, over the name, dtype, shape and every byte of every parameter and buffer, and the configuration.

    Unlike the fingerprint of a patch it sees every bit, so an edited model is never taken for the one before; it reads
    all weights, about 1 s per 1.5 GB, those that accelerate left on disk one by one.
    """
    import torch

    digest = hashlib.sha256(b"pke_fast weights 1\n")
    config = dict(model.config.to_dict())
    for key in ("_name_or_path", "name_or_path", "transformers_version"):  # where it was loaded from says nothing
        config.pop(key, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    buffers = dict(model.named_buffers())
    for name in sorted([*stored_names(model), *buffers]):
        tensor = buffers[name] if name in buffers else stored_weight(model, name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
