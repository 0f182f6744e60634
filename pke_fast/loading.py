"""From a name (`smollm2`, a folder, a .gguf file, a hub id) to a model and its tokenizer, ready to use."""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pke_fast.errors import InputError
from pke_fast.pretrained import explained, load_gguf, pretrained, pretrained_tokenizer, quiet
from pke_fast.sources import ask_hub, check_config, check_files, find_path
from pke_fast.stages import Stages

if TYPE_CHECKING:
    import torch
    from torch import nn

SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")  # transformers' words for a device_map that it makes


@dataclass
class LoadedModel:
    """A model in eval mode whose parameters need no gradients, and its tokenizer.

    Attributes:
        name: as it was asked for; the hub id that stood in for `smollm2` where the package isn't installed.
        source: the folder that its safetensors were read from (of the hub's cache, for a hub id); None for a .gguf.
        device: such as "cpu" or "cuda:0"; of a model that is spread, where its tokens go.
        dtype: of its weights: "fp32", "bf16" or "fp16".
    """

    model: Any
    tokenizer: Any
    name: str
    source: Path | None
    device: str
    dtype: str


@dataclass(frozen=True)
class Outline:
    """What is known of a model without its weights.

    Attributes:
        config: of transformers.
        device: where it would be loaded.
        dtype: of the weights it would be loaded with.
        mapped: whether they would stay in their file (`mapped`): on a CPU, in the checkpoint's own dtype.
    """

    config: Any
    tokenizer: Any
    device: str
    dtype: torch.dtype
    mapped: bool


def load_outline(name: str | Path, device: str | torch.device = "auto", dtype: str = "auto") -> Outline:
    """A model's configuration and tokenizer; its weights are neither read nor, from the hub, fetched.

    Args:
        name, device, dtype: as for `load_model`.

    Raises:
        InputError: as `load_model`, for what can be told without weights.
    """
    import torch
    from transformers import AutoConfig

    device, wanted = resolve_device(device), resolve_dtype(dtype)
    name, path = _resolve_name(name, Stages(show=False))
    with quiet(), explained(name):
        options: dict[str, Any] = {}
        place = str(path or name)
        if path and path.is_file():
            place, options = str(path.parent), {"gguf_file": path.name}
        else:
            source, online = (path, False) if path else ask_hub(name)
            check_config(source, name, False)
            options = {"local_files_only": not online}
        config = AutoConfig.from_pretrained(place, **options)
        tokenizer = pretrained_tokenizer(place, **options)
    own = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    own = own if isinstance(own, torch.dtype) else torch.float32
    mapped = sys.platform == "linux" and device == "cpu" and wanted in (None, own) and "gguf_file" not in options
    return Outline(config, tokenizer, device, wanted or own, mapped)


def load_model(
    name: str | Path,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    stages: Stages | None = None,
    trust_remote_code: bool = False,
    device_map: str | dict[str, Any] | None = None,
) -> LoadedModel:
    """Loads a model and its tokenizer.

    Args:
        name: `smollm2` (the embedded model), a folder with a transformers checkpoint, a .gguf file, or a hub id. What
            exists as a path is taken from there.
        device: see `resolve_device`.
        dtype: "fp32", "bf16", "fp16", or "auto": as the checkpoint has it (fp32 for a .gguf file).
        stages: shows the progress.
        trust_remote_code: let a model run Python code that comes with it.
        device_map: spreads it over GPUs, the host's memory ("cpu") and its checkpoint on disk ("disk"): as transformers
            takes it, or a JSON file with such a map. `device` stays "auto" then.

    Raises:
        InputError: no such model, device or device_map, or not a causal language model with whole, finite, unquantized
            safetensors weights and a tokenizer.
        PKEError: not enough memory, or a full disk.
    """
    from pke_fast.placement import input_device

    spread = None if device_map is None else resolve_device_map(device_map, device)
    device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype)
    stages = stages or Stages(device, show=False)
    name, path = _resolve_name(name, stages)
    with stages.stage(f"loading {path.name if path else name}"), quiet(), explained(name):
        source: Path | None
        if path and path.is_file():
            if spread is not None:
                raise InputError(f"{path} can't be spread by device_map", expected="a checkpoint in safetensors")
            source = None
            model, tokenizer = load_gguf(path, torch_dtype)
        else:
            source, online = (path, False) if path else ask_hub(name)
            check_config(source, name, trust_remote_code)
            if path:
                check_files(path)
            where: dict[str, Any] = {"local_files_only": not online, "trust_remote_code": trust_remote_code}
            spreads = {} if spread is None else {"device_map": spread}
            model = pretrained(str(path or name), torch_dtype or "auto", use_safetensors=True, **where, **spreads)
            tokenizer = pretrained_tokenizer(str(path or name), **where)
        if spread is None:
            model.to(device)
        else:
            device = str(input_device(model))
        model.eval().requires_grad_(False)
        check_finite(model)
    return LoadedModel(model, tokenizer, name, source, device, _dtype_name(model))


def resolve_device(device: str | torch.device, gpus: int | None = None) -> str:
    """The device of that name: "cpu" or "cuda:i". "auto" is the first GPU where there is one, else the CPU.

    Args:
        device: "auto", "cpu", "cuda" (the first GPU) or "cuda:i", or torch's own.
        gpus: how many there are; None asks torch.

    Raises:
        InputError: it isn't there; says what is.
    """
    import torch

    device = str(device)
    gpus = _gpus() if gpus is None else gpus
    there = ["cpu", *(f"cuda:{index}" for index in range(gpus))]
    if device == "auto":
        return there[1] if gpus else "cpu"
    wanted = "cuda:0" if device == "cuda" else device
    if wanted not in there:
        no_gpu = "torch finds no GPU" + ("" if torch.version.cuda else ": it is a build without CUDA")
        raise InputError(
            f"no such device: {device}",
            expected=f"auto, or one of: {', '.join(there)}",
            got=f"{device}, but {no_gpu}" if device.startswith("cuda") and not gpus else device,
            do="name a device that is there, or leave it to auto",
        )
    return wanted


def resolve_device_map(device_map: str | dict[str, Any], device: str | torch.device = "auto") -> str | dict[str, Any]:
    """A device_map for transformers, from its own words, a map, or a JSON file that holds one.

    Raises:
        InputError: it is none of these, it names a device that isn't there, or a device is named besides.
    """
    if device != "auto":
        raise InputError("a device and a device_map", expected="one of them", got=f"{device} and {device_map}")
    if isinstance(device_map, dict):
        _check_places(device_map, "the device_map")
        return device_map
    if not isinstance(device_map, str) or device_map in SPREADS:
        return device_map
    expected = f"one of: {', '.join(SPREADS)}; or a JSON file: {{module: GPU's number, cpu or disk}}"
    try:
        found = json.loads(Path(device_map).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"no such device_map: {device_map}", expected=expected, got=str(error)) from error
    if not isinstance(found, dict) or not all(isinstance(place, int | str) for place in found.values()):
        raise InputError(f"{device_map} holds no device_map", expected=expected, got=f"{found!r:.80}")
    _check_places(found, device_map)
    return found


def _check_places(device_map: dict[str, Any], name: str) -> None:
    """Raises InputError for a map without modules, or with a device that isn't there."""
    if not device_map:
        raise InputError(f"{name} names no module", expected="a device for each", do='{"": "cpu"} names them all')
    gpus = _gpus()
    there = {"cpu", "disk", *(f"cuda:{index}" for index in range(gpus)), *(["cuda"] if gpus else [])}
    for module, place in device_map.items():
        if (f"cuda:{place}" if type(place) is int else str(place)) not in there:
            raise InputError(
                f"{name} puts {module or 'the model'} on a device that isn't there",
                expected="cpu, disk" + (f", or a GPU's number below {gpus}" if gpus else "; torch finds no GPU"),
                got=repr(place),
            )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def resolve_dtype(dtype: str) -> torch.dtype | None:
    """The torch dtype of one of our names; None for "auto"."""
    from pke_fast.dtypes import BY_NAME

    if dtype == "auto":
        return None
    if dtype not in BY_NAME:
        raise InputError(f"unknown dtype: {dtype}", expected=f"auto or one of: {', '.join(BY_NAME)}", got=dtype)
    return BY_NAME[dtype]


def check_finite(model: nn.Module) -> None:
    """Raises InputError, naming the first parameter that has a NaN or an infinity in it."""
    import torch

    from pke_fast.placement import stored_parameters

    for name, parameter in stored_parameters(model):
        if parameter.numel() and not torch.isfinite(torch.stack(parameter.detach().aminmax())).all():
            raise InputError(
                f"the model's weights aren't finite: {name}",
                expected="numbers",
                got="NaN or infinity in it",
                do="get the checkpoint anew, or load it with another dtype (fp16 holds nothing above 65,504)",
            )


def context_length(model: Any) -> int | None:
    """The longest sequence, in tokens, that the model's configuration allows; None where it doesn't say."""
    config = getattr(model.config, "text_config", None) or model.config
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def pad_token_id(tokenizer: Any, model: Any) -> int:
    """A token to pad with: the tokenizer's own, else its end token, else the model's, else 0.

    Always one that the model has an embedding for.
    """
    size = model.get_input_embeddings().weight.shape[0]
    ends = getattr(model.config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    candidates = [tokenizer.pad_token_id, tokenizer.eos_token_id, getattr(model.config, "pad_token_id", None), *ends]
    return next((token for token in candidates if isinstance(token, int) and 0 <= token < size), 0)


def _resolve_name(name: str | Path, stages: Stages) -> tuple[str, Path | None]:
    """The name to report, and the file or folder; None for a hub id."""
    if not isinstance(name, str | Path):
        raise InputError("the model has no name", expected="a name or a path", got=type(name).__name__)
    name = str(name)
    if name != "smollm2":
        return name, find_path(name)
    from pke_fast import smollm2

    if smollm2.is_installed():
        return name, smollm2.default_model_folder(stages)
    warnings.warn(
        f"the package {smollm2.DISTRIBUTION} isn't installed: smollm2 is taken from the hub, as {smollm2.HUB_ID}",
        stacklevel=3,
    )
    return smollm2.HUB_ID, None


def _dtype_name(model: Any) -> str:
    """Our name of the dtype that most of the weights have."""
    from pke_fast.dtypes import NAMES

    counts: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        counts[parameter.dtype] += parameter.numel()
    ((most, _),) = counts.most_common(1)
    if most not in NAMES:
        got = str(most).removeprefix("torch.")
        expected = f"one of: {', '.join(NAMES.values())}"
        raise InputError(f"the model's weights are {got}", expected=expected, got=got, do="give --dtype fp32")
    return NAMES[most]
