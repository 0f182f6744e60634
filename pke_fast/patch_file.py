"""The file format of a patch: safetensors, with a checksum of every tensor and of the metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pke_fast.errors import PatchError
from pke_fast.files import atomic_write

FORMAT = "pke_fast.patch"
VERSIONS = (1, 2)  # 2 names the projection of each part; 1 has down projections alone
CODES = {
    torch.int64: "I64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_AGAIN = "copy it again from where it was made"


@dataclass(frozen=True, eq=False)
class Content:
    """What a patch file holds.

    Attributes:
        version: of the format.
        layers: one object of JSON values for each part.
        tensors: by name, on the CPU, contiguous; int64, fp32, bf16 or fp16.
        meta: JSON values.
    """

    version: int
    layers: list[dict[str, Any]]
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def write(path: str | Path, content: Content) -> None:
    """Writes the file, whole or not at all. The same content gives the same bytes.

    Raises:
        PKEError: the file can't be written.
    """
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.writelines(pieces(content))


def pieces(content: Content) -> Iterator[bytes]:
    """The bytes of the file, a tensor at a time."""
    metadata = {
        "format": FORMAT,
        "version": str(content.version),
        "meta": json.dumps(content.meta, sort_keys=True),
        "layers": json.dumps(content.layers),
        "sha256": json.dumps({name: _digest(tensor) for name, tensor in content.tensors.items()}),
    }
    yield header(content.tensors, {**metadata, "checksum": _checksum(metadata)})
    for tensor in content.tensors.values():
        yield _bytes(tensor)


def read(path: str | Path) -> Content:
    """Reads the file and compares every tensor and the metadata with their checksums.

    Raises:
        PatchError: no such file, not a patch, a newer format, cut short, or damaged; it names what is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise PatchError(f"no such patch: {path}", expected="a patch.safetensors", do="check the path") from error
    except OSError as error:
        raise PatchError(f"can't read the patch {path}", got=error.strerror) from error
    try:
        tensors = load(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    except (
        SafetensorError,
        ValueError,
        KeyError,
    ) as error:  # KeyError: a dtype that safetensors knows and torch doesn't
        raise PatchError(
            f"{path} is not a patch, or it is cut short or damaged",
            expected="the whole patch.safetensors that pke-fast edit wrote",
            got=f"{len(data):,} bytes ({error})",
            do=_AGAIN,
        ) from error
    rest = _checked_metadata(path, metadata)
    try:
        digests = json.loads(rest["sha256"])
        content = Content(int(rest["version"]), json.loads(rest["layers"]), tensors, json.loads(rest["meta"]))
    except (KeyError, json.JSONDecodeError) as error:
        raise PatchError(f"the patch {path} is damaged", got=f"incomplete metadata: {error}", do=_AGAIN) from error
    bad = [name for name in digests if name not in tensors or _digest(tensors[name]) != digests[name]]
    bad += [name for name in tensors if name not in digests]
    if bad:
        raise PatchError(
            f"the patch {path} is damaged",
            expected="every tensor equal to its checksum",
            got=f"other bytes, or none, in {', '.join(bad)}",
            do=_AGAIN,
        )
    return content


def _checked_metadata(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    rest = {name: text for name, text in metadata.items() if name != "checksum"}
    if metadata.get("checksum") != _checksum(rest):
        if rest.get("format") != FORMAT:
            raise PatchError(
                f"{path} is not a patch",
                expected="a patch.safetensors of pke-fast edit",
                got="a safetensors file of something else, or a damaged one",
            )
        raise PatchError(f"the patch {path} is damaged", got="metadata that differ from their checksum", do=_AGAIN)
    if rest.get("version") not in [str(version) for version in VERSIONS]:
        raise PatchError(
            f"{path} is a patch of format version {rest.get('version')}",
            expected=f"version {' or '.join(map(str, VERSIONS))}, which this pke_fast reads",
            do="install a newer pke_fast: the one that wrote it, at least",
        )
    return rest


def header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The start of a safetensors file. Written here because safetensors leaves the order of the metadata to chance."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _digest(tensor: Tensor) -> str:
    head = f"{tensor.dtype} {list(tensor.shape)}\n".encode()
    return hashlib.sha256(head + _bytes(tensor)).hexdigest()


def _checksum(metadata: Mapping[str, str]) -> str:
    """sha256 of the metadata without the checksum. The same for every version, so that a newer one is recognised."""
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
