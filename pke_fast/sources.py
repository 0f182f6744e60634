"""Where a model's files are (a folder, a .gguf file, the hub), and whether they can be a model, before it is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

from pke_fast.errors import InputError
from pke_fast.shards import INDEX, SINGLE

_CHECKPOINT = "a transformers checkpoint of a causal language model: config.json, safetensors weights, a tokenizer"
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json")
_HUB_TIMEOUT = 10.0  # seconds; the hub's own limit for one answer (HF_HUB_ETAG_TIMEOUT)


def find_path(name: str) -> Path | None:
    """The file or folder of that name, or None if it can only be a hub id.

    Raises:
        InputError: a path that doesn't exist, or a file that isn't a .gguf.
    """
    if not name.strip():
        raise InputError(
            "the model has no name", expected="smollm2, a folder, a .gguf file or a hub id", got=repr(name)
        )
    path = Path(name).expanduser()
    if os.path.exists(path):  # unlike Path.exists, also for a name that no path can have
        if path.is_file() and path.suffix != ".gguf":
            raise InputError(f"{name} isn't a model", expected="a folder or a .gguf file", got="another file")
        return path
    if name.endswith((".gguf", "/", "\\")) or name.startswith((".", "~")) or path.is_absolute() or name.count("/") > 1:
        raise InputError(
            f"no such {'file' if name.endswith('.gguf') else 'folder'}: {name}",
            expected=f"a .gguf file, or {_CHECKPOINT}",
            got="nothing there",
            do=f"check the path; the current folder is {Path.cwd()}",
        )
    return None


def ask_hub(name: str) -> tuple[Path, bool]:
    """Gets the configuration of a hub model.

    Returns:
        The folder of the hub's cache that it is in (weights land there too), and whether the hub can be asked.

    Raises:
        InputError: no folder of that name, and the hub can't be reached or has no such model. Comes within seconds.
    """
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id
    from transformers.utils import cached_file

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise _nowhere(name, "a name that the hub doesn't allow") from error
    # The hub's client tries for half a minute where there is no network: one question first tells.
    trouble = _hub_trouble()
    try:
        config = cached_file(name, "config.json", local_files_only=trouble is not None)
    except OSError as error:
        if trouble:
            raise _nowhere(name, f"nothing in the hub's cache, and {trouble}") from error
        if isinstance(error.__cause__, GatedRepoError):
            raise _nowhere(
                name, "the hub's model asks for an agreement", "agree on its page, then: hf auth login"
            ) from error
        if isinstance(error.__cause__, RepositoryNotFoundError):
            raise _nowhere(name, "the hub has no such model, or it is private") from error
        raise _nowhere(name, str(error).split("\n")[0]) from error
    return Path(str(config)).parent, trouble is None


def check_config(folder: Path, name: str, trust_remote_code: bool) -> None:
    """Checks by its config.json that a checkpoint is one of a causal language model that transformers can load.

    Raises:
        InputError: it isn't; says why.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = _read_json(folder / "config.json")
    kind = config.get("model_type")
    if config.get("quantization_config"):
        raise InputError(
            f"the weights of {name} are quantized",
            expected="weights in fp32, bf16 or fp16: an edit changes single weights",
            got=f"quantization_config: {json.dumps(config['quantization_config'])[:120]}",
            do="name the checkpoint that it was made from",
        )
    if "auto_map" in config and trust_remote_code:
        return
    if kind not in CONFIG_MAPPING_NAMES:
        if "auto_map" in config:
            raise InputError(
                f"{name} needs Python code that comes with it",
                expected="a model that transformers knows by itself",
                got=f"model_type {kind!r} with code of its own",
                do="read that code; if you trust it: pke_fast.load_model(..., trust_remote_code=True)",
            )
        raise InputError(
            f"{name} isn't a model that transformers {transformers.__version__} knows",
            expected=_CHECKPOINT,
            got=f"config.json with model_type {kind!r}",
            do="install a newer transformers, if the model is newer than yours",
        )
    classes = config.get("architectures") or []
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (classes and not known.intersection(classes)):
        raise InputError(
            f"{name} isn't a causal language model",
            expected="a model that continues text, such as LlamaForCausalLM",
            got=f"model_type {kind!r}, architectures {classes}",
        )


def check_files(folder: Path) -> None:
    """Checks that the weights and the tokenizer of a local checkpoint are there, and its safetensors files whole.

    Raises:
        InputError: something is missing or cut short; names it.
    """
    from safetensors import SafetensorError, safe_open

    from pke_fast.journal import JOURNAL

    if (folder / JOURNAL).exists():
        raise InputError(
            f"the checkpoint {folder} is in the middle of a change in place",
            expected="old weights or new ones, not some of both",
            got=f"a journal, {JOURNAL}: a change was interrupted, or is going on",
            do=f"wait until it has ended, or run pke-fast recover {folder}",
        )
    index = folder / INDEX
    if index.is_file() and not (folder / SINGLE).is_file():  # transformers prefers the one file where both are there
        content = _read_json(index)
        if not isinstance(content.get("weight_map"), dict):
            raise InputError(f"{index} is broken", expected="a JSON object with a weight_map")
        files = [folder / str(shard) for shard in sorted(set(content["weight_map"].values()))]
    else:
        files = [folder / SINGLE]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        raise InputError(
            f"weights are missing in {folder}",
            expected=", ".join(missing),
            got=f"pickle files, which can run code: {', '.join(pickled)}" if pickled else "no such file",
            do="save the model anew with save_pretrained, which writes safetensors" if pickled else "get it anew",
        )
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass  # opening reads the header and compares the file's length with it
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file} is damaged", expected="a whole safetensors file", got=str(error), do="get the file anew"
            ) from error
    if not any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_FILES):
        raise InputError(
            f"no tokenizer in {folder}",
            expected=f"one of: {', '.join(_TOKENIZER_FILES)}",
            do="save the tokenizer there as well: tokenizer.save_pretrained(folder)",
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        adapter = file.with_name("adapter_config.json").is_file()
        raise InputError(
            f"{file.parent} isn't a model",
            expected=_CHECKPOINT,
            got="a PEFT adapter without its model" if adapter else f"a folder without {file.name}",
            do="merge the adapter into its model and save that" if adapter else "name the folder that has these files",
        ) from error
    except (OSError, ValueError) as error:  # a JSON or Unicode error is a ValueError
        raise InputError(f"{file} can't be read", expected="a JSON object", got=str(error), do="get it anew") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is broken", expected="a JSON object", got=type(content).__name__)
    return content


def _hub_trouble() -> str | None:
    """Why the hub can't be asked; None if it answers, whatever it answers."""
    import urllib.request

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "the hub isn't asked (HF_HUB_OFFLINE is set)"
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=_HUB_TIMEOUT):
            return None
    except HTTPError:
        return None
    except URLError as error:
        # With certificates of its own (a company's proxy) the hub's client may do what urllib can't.
        certificate = type(error.reason).__name__ == "SSLCertVerificationError"
        return None if certificate else f"the hub could not be reached ({error.reason})"
    except (OSError, ValueError) as error:  # a timeout while reading; an HF_ENDPOINT that isn't an address
        return f"the hub could not be reached ({error})"


def _nowhere(name: str, why: str, do: str | None = None) -> InputError:
    return InputError(
        f"no such model: {name}",
        expected="smollm2, a folder, a .gguf file, or a model of the hub",
        got=f"no folder of that name in {Path.cwd()}; {why}",
        do=do or "check the name; for a private model: hf auth login",
    )
