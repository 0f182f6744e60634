"""transformers' from_pretrained, as pke_fast calls it: quiet, safetensors only, whole, its errors explained."""

from __future__ import annotations

import errno
import functools
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pke_fast.errors import InputError, PKEError

if TYPE_CHECKING:
    import torch

_READ_FROM = ("quantization_config", "_name_or_path")  # what a configuration says of the file it was read from


def pretrained(place: str | None, dtype: Any, kind: Any = None, **options: Any) -> Any:
    """from_pretrained of `kind` (a causal language model by default); refuses a checkpoint that lacks weights."""
    model, missing = _read(place, dtype, kind, **options)
    if missing:
        raise InputError(
            "the checkpoint lacks weights that its model has",
            expected=f"every parameter of {type(model).__name__}",
            got=f"{len(missing)} missing, such as {missing[0]}",
            do="name the whole model's checkpoint (a causal language model with its output head)",
        )
    return model


def pretrained_tokenizer(place: str, **options: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place, **options)


def load_gguf(path: Path, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The model of a .gguf file, its weights unpacked to `dtype` (fp32 if None), and its tokenizer; on the CPU.

    The model is a plain one: unlike what transformers makes of the file, it can be saved.
    """
    import torch
    import transformers

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path} isn't a GGUF file", expected="a file that begins with the letters GGUF")
    dtype = dtype or torch.float32
    # transformers 5 would keep the weights packed where it has a kernel for that.
    packing = getattr(transformers, "GgufConfig", None)
    unpacked = {"quantization_config": packing(dequantize=True)} if packing else {}
    with _no_gguf_bar():
        read, missing = _read(str(path.parent), dtype, gguf_file=path.name, **unpacked)
    settings = {key: value for key, value in read.config.to_dict().items() if key not in _READ_FROM}
    # A file without an output head has it tied to the embeddings, which older transformers doesn't see.
    settings["tie_word_embeddings"] = settings.get("tie_word_embeddings", False) or missing == ["lm_head.weight"]
    weights = {name: weight for name, weight in read.state_dict().items() if name not in missing}
    model = pretrained(None, dtype, type(read), config=type(read.config).from_dict(settings), state_dict=weights)
    model.generation_config = read.generation_config
    return model, pretrained_tokenizer(str(path.parent), gguf_file=path.name)


def _read(place: str | None, dtype: Any, kind: Any = None, **options: Any) -> tuple[Any, list[str]]:
    """A model, and the names of the parameters that its checkpoint lacks."""
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    options["dtype" if version >= (4, 56) else "torch_dtype"] = dtype
    kind = kind or transformers.AutoModelForCausalLM
    model, info = kind.from_pretrained(place, output_loading_info=True, **options)
    return model, sorted(info["missing_keys"])


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the logs, warnings and progress bars of transformers and of the hub's client; restores them after."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    levels = logging.get_verbosity(), hub.get_verbosity()
    bars, hub_bars = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.set_verbosity_error()
        hub.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(levels[0])
            hub.set_verbosity(levels[1])
            if bars:
                logging.enable_progress_bar()  # turns the hub's on as well
            if hub_bars:
                enable_progress_bars()
            else:
                disable_progress_bars()


@contextmanager
def _no_gguf_bar() -> Iterator[None]:
    """Hides the bar that the GGUF reader draws past transformers' own switch."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = getattr(reader, "tqdm", None)
    if bar is None:
        yield
        return
    reader.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        reader.tqdm = bar


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turns what transformers raises for a model that can't be loaded into InputError."""
    from huggingface_hub import errors
    from safetensors import SafetensorError

    from pke_fast.memory import is_out_of_memory

    # A configuration with a value of a wrong kind; the class came with transformers 5's configurations.
    strict = getattr(errors, "StrictDataclassError", SafetensorError)
    try:
        yield
    except PKEError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, ImportError,
            AssertionError, MemoryError, SafetensorError, strict, struct.error) as error:  # fmt: skip
        if is_out_of_memory(error):
            do = "give --dtype bf16, another device or a smaller model"
            raise PKEError(f"not enough memory for {name}", got=str(error), do=do) from error
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise PKEError(f"can't load {name}: the disk is full", got=str(error), do="free some space") from error
        text = " ".join(str(error).split())
        raise InputError(
            f"{name} can't be loaded",
            expected="a causal language model and its tokenizer, as transformers saves them",
            got=f"{type(error).__name__}: {text if len(text) <= 300 else text[:299] + '…'}",
            do="get the checkpoint anew, or name another one",
        ) from error
