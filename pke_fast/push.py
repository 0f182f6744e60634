"""Puts a patch, or an edited model with its patch, on the Hugging Face hub: what goes there, and the transport."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from pke_fast import patch_file
from pke_fast.card import PATCH, Shared, model_card
from pke_fast.errors import InputError, PatchError, PKEError
from pke_fast.files import visible_files
from pke_fast.layer_patch import differing
from pke_fast.patch import Patch

CARD = "README.md"
# Beside weights, a patch lies in a folder: vLLM reads every .safetensors that lies beside config.json.
PATCH_BESIDE_WEIGHTS = f"pke_fast/{PATCH}"
# What transformers needs of a model, and what a licence asks to travel with it. Nothing else in the folder is uploaded.
_MODEL_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "additional_chat_templates/*.jinja", "configuration_*.py", "modeling_*.py", "tokenization_*.py",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


@dataclass(frozen=True)
class Upload:
    """What goes to the hub.

    Attributes:
        repo: ``name`` or ``owner/name``.
        files: by path in the repository: a file of this machine, or the bytes themselves.
        left_out: files of the model's folder that stay here.
        warnings: what should be known before it is public.
    """

    repo: str
    files: Mapping[str, Path | bytes]
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def card(self) -> str:
        content = self.files[CARD]
        return content.decode("utf-8") if isinstance(content, bytes) else content.read_text(encoding="utf-8")

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


def prepare(shared: Shared, repo: str, model: str | Path | None = None) -> Upload:
    """Decides what goes to the hub; asks no network and writes nothing.

    That is the card and the patch, and with `model` the files of an edited checkpoint that transformers reads. Reports
    and generated answers hold harmful prompts, and stay here. Paths of this machine are taken out of the patch's
    metadata; its weights and ids are the same.

    Args:
        shared: the edit (`pke_fast.card.gather`).
        repo: ``name`` or ``owner/name``.
        model: folder of the checkpoint with the patch applied.

    Raises:
        InputError: `repo` is no name for a repository, or `model` no checkpoint.
        PatchError: the patch isn't applied to `model`.
    """
    _check_repo(repo)
    files: dict[str, Path | bytes] = {}
    left_out: list[str] = []
    if model is not None:
        files, left_out = _model_files(Path(model), shared.patch)
    card = model_card(shared, repo, merged=model is not None)
    files[CARD] = card.encode()
    files[PATCH if model is None else PATCH_BESIDE_WEIGHTS] = _patch_bytes(public_patch(shared.patch, shared.base))
    warnings = []
    if shared.base is None:
        warnings.append("the card names no base model: give --base OWNER/NAME")
    if not shared.licence:
        warnings.append("the card states no licence: give --license NAME (the base model's terms hold in any case)")
    if not any(shared.evaluation):
        warnings.append("the card has no measured figures: give --eval eval.json ... of pke-fast eval")
    return Upload(repo, dict(sorted(files.items())), tuple(left_out), tuple(warnings))


def _check_repo(repo: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(
            f"{repo!r} is no name for a repository", expected="name or owner/name", got=str(error), do="check --repo"
        ) from error


def _model_files(folder: Path, patch: Patch) -> tuple[dict[str, Path | bytes], list[str]]:
    from pke_fast.shards import read_checkpoint
    from pke_fast.sources import check_files
    from pke_fast.stored import find_targets, read_all

    tensors = read_checkpoint(folder)
    check_files(folder)
    targets = find_targets(tensors, patch, folder)
    found = read_all(folder, targets)
    try:
        patch.check(found, True, f"the checkpoint {folder}")
    except PatchError as error:
        if any(differing(values, part.old) for values, part in zip(found, patch.layers, strict=True)):
            raise
        raise PatchError(
            error.what,
            expected="the edited model",
            do=f"apply it first: pke-fast apply --model {shlex.quote(str(folder))} --patch P --out EDITED",
        ) from error
    files: dict[str, Path | bytes] = {}
    left_out = []
    for file in visible_files(folder):
        name = file.relative_to(folder).as_posix()
        if any(
            fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in _MODEL_FILES
        ):
            files[name] = file
        else:
            left_out.append(name)
    return files, left_out


def public_patch(patch: Patch, base: str | None) -> Patch:
    """The patch without paths of this machine in its metadata: a path becomes its last part, the base its hub id."""
    meta = _without_paths(patch.meta)
    if base and isinstance(patch.meta.get("base"), dict) and meta["base"].get("name") != "smollm2":
        meta["base"]["name"] = base
    return dataclasses.replace(patch, meta=meta)


def _without_paths(value: Any, key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {name: _without_paths(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item, key) for item in value]
    if key in ("name", "source") and isinstance(value, str) and _is_path(value):
        return PurePath(value.replace("\\", "/")).name
    return value


def _is_path(text: str) -> bool:
    return text.startswith(("/", ".", "~")) or "\\" in text or text.count("/") > 1 or os.path.exists(text)


def _patch_bytes(patch: Patch) -> bytes:
    return b"".join(patch_file.pieces(patch.content()))


def push(upload: Upload, *, private: bool = False, force: bool = False, api: Any = None) -> str:
    """Makes the repository and uploads everything in one commit. Returns its address.

    Args:
        private: only its owner sees the repository.
        force: a repository that is there already gets the files as another commit; its other files stay.
        api: in place of ``huggingface_hub.HfApi()``.

    Raises:
        InputError: the repository is there already and `force` isn't set; or it is public and `private` is set.
        PKEError: not logged in, not allowed to, or the hub can't be reached; nothing was uploaded.
    """
    import huggingface_hub
    from huggingface_hub.utils import HfHubHTTPError

    api = api or huggingface_hub.HfApi()
    with _explained(upload.repo):
        owner = api.whoami()["name"]
        repo = upload.repo if "/" in upload.repo else f"{owner}/{upload.repo}"
        try:
            api.create_repo(repo, private=private, repo_type="model", exist_ok=False)
        except HfHubHTTPError as error:
            if _status(error) != 409:  # conflict: it is there already
                raise
            _check_existing(api, repo, private, force)
        operations = [
            huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
            for name, content in _addressed(upload, repo).items()
        ]
        done = api.create_commit(
            repo, operations, commit_message="Upload an edit made with pke_fast", repo_type="model"
        )
    return str(getattr(done, "repo_url", None) or f"https://huggingface.co/{repo}")


def _check_existing(api: Any, repo: str, private: bool, force: bool) -> None:
    if not force:
        raise InputError(
            f"the repository {repo} is there already",
            expected="a new one",
            do="name another, or give --force to add a commit to it (its other files and its history stay)",
        )
    if private and not api.repo_info(repo, repo_type="model").private:
        raise InputError(
            f"the repository {repo} is public",
            expected="a private one, as --private asks",
            do="make it private in its settings, name another, or leave out --private",
        )


def _addressed(upload: Upload, repo: str) -> dict[str, Path | bytes]:
    """The files, with the owner in the card's commands where the name was given without one."""
    if repo == upload.repo:
        return dict(upload.files)
    card = re.sub(rf'"{re.escape(upload.repo)}"', f'"{repo}"', upload.card)
    return {**upload.files, CARD: card.encode()}


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _client_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises: its own errors, those of the HTTP library beneath it, and the system's."""
    from huggingface_hub.utils import HfHubHTTPError

    beneath = [kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"]
    return (OSError, *(kind for kind in beneath if issubclass(kind, Exception)))


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    from huggingface_hub.utils import LocalTokenNotFoundError, OfflineModeIsEnabled

    login = "run hf auth login, or set HF_TOKEN to a token that may write (huggingface.co/settings/tokens)"
    try:
        yield
    except PKEError:
        raise
    except LocalTokenNotFoundError as error:
        raise PKEError("not logged in to the Hugging Face hub", got="no token", do=login) from error
    except OfflineModeIsEnabled as error:
        raise PKEError(
            "the hub isn't asked: HF_HUB_OFFLINE is set", do="unset it, or give --dry-run to see what would be uploaded"
        ) from error
    except _client_errors() as error:
        status, text = _status(error), f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if status == 401:
            raise PKEError("the hub doesn't accept the token", got=text, do=login) from error
        if status == 403:
            raise PKEError(f"the token may not write to {repo}", got=text, do=login) from error
        made = "nothing was uploaded; a repository that was made already stays, empty: then give --force"
        if status is not None:
            raise PKEError(f"the hub refused the upload to {repo}", got=text, do=f"see what it says; {made}") from error
        raise PKEError(
            "the hub could not be reached", got=text, do=f"check the network (and HF_ENDPOINT); {made}"
        ) from error
