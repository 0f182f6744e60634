"""PKEHyperParams: EasyEdit's hyperparameters of DINM, read from its own YAML files, for DINM and PKE."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pke_fast.config import MOST_LR, WITHOUT_DETECTORS, PKEConfig
from pke_fast.detectors import wanted
from pke_fast.errors import InputError

ALGORITHMS = ("DINM", "PKE")
MODES = ("fixed", "parity")
_NEEDED = ("layers", "num_steps", "lr", "weight_decay", "kl_factor", "norm_constraint", "max_length")  # by either mode


class HyperParamError(InputError, TypeError):
    """A hyperparameter is missing, unknown or of the wrong type; a TypeError too, as a dataclass would raise."""


@dataclass(init=False)
class PKEHyperParams:
    """EasyEdit's hyperparameters of DINM, by its names, and two of pke_fast's own.

    A string where a number belongs is converted, since PyYAML reads 5e-4 as a string.

    Attributes:
        layers: layers to edit; empty: they are located.
        num_steps, lr, weight_decay: of Adam. `weight_decay` pulls towards the old weights; in parity, towards zero.
        kl_factor: weight of the safe answer's loss, against a KL term of weight 1.
        norm_constraint: most that one weight may move; False or None for no bound. In parity only a float counts.
        rewrite_module_tmp: which parameters parity edits; the fixed mode edits down projections, found by structure.
        device: a GPU's number, or a device's name; for models that are loaded by name.
        alg_name: "DINM" or "PKE".
        model_name: what to load, or a tuple (model, tokenizer).
        max_length, max_output_length: tokens of a prompt with its answer, and of an answer that is generated.
        fp16: load in fp16.
        mode: "fixed" runs pke_fast's method of the algorithm's name; "parity" computes what EasyEdit's DINM does.
        settings: more of pke_fast's settings (`PKEConfig`), which win over those above; for mode "fixed".
        others: kept for EasyEdit's sake; the structure is found without them.

    Raises:
        HyperParamError: one is missing, unknown or wrong; all that are missing are named.
    """

    layers: list[int]
    num_steps: int
    lr: float
    weight_decay: float
    kl_factor: float
    norm_constraint: float | bool | None
    model_class: str
    tokenizer_class: str
    suffix_system_prompt: str
    rewrite_module_tmp: str
    layer_module_tmp: str
    mlp_module_tmp: str
    attn_module_tmp: str
    ln_f_module: str
    lm_head_module: str
    device: int | str
    alg_name: str
    model_name: Any
    batch_size: int = 1
    max_length: int = 1000
    max_output_length: int = 600
    model_parallel: bool = False
    fp16: bool = False
    mode: Literal["fixed", "parity"] = "fixed"
    settings: dict[str, Any] = field(default_factory=dict)

    def __init__(self, **given: Any) -> None:
        known = {item.name: item for item in dataclasses.fields(self)}
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise HyperParamError(
                "unknown hyperparameters: " + ", ".join(unknown),
                expected="EasyEdit's of DINM, mode and settings",
                do="settings of pke_fast go under `settings`",
            )
        lacking = [name for name, item in known.items() if name not in given and not _has_default(item)]
        if lacking:
            raise HyperParamError(
                "hyperparameters are missing: " + ", ".join(lacking), do="see EasyEdit's hparams/DINM"
            )
        for name, item in known.items():
            value = given[name] if name in given else _default(item)
            setattr(self, name, _CHECKS.get(name, _text)(name, value))

    @classmethod
    def from_hparams(cls, hparams_name_or_path: str | Path | Mapping[str, Any]) -> PKEHyperParams:
        """Hyperparameters from a YAML file (".yaml" may be left out), YAML text of several lines, or a dict.

        Raises:
            InputError: no such file, or not YAML.
            HyperParamError: a hyperparameter is missing, unknown or wrong.
        """
        import yaml

        source = hparams_name_or_path
        if isinstance(source, Mapping):
            return cls(**source)
        text = str(source)
        where = "the hyperparameters"
        if "\n" not in text:
            path = Path(text if ".yaml" in text else f"{text}.yaml")
            where = f"the hyperparameters in {path}"
            try:
                text = path.read_text(encoding="utf-8")
            except OSError as error:
                raise InputError(f"can't read {where}", got=error.strerror, do="check the path") from error
            except UnicodeDecodeError as error:
                raise InputError(f"can't read {where}", expected="text in UTF-8", got=str(error)) from error
        try:
            loaded = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:  # a ValueError: 2024-13-45, which looks like a date
            raise InputError(f"{where} are not YAML", got=str(error)) from error
        if not isinstance(loaded, dict):
            raise InputError(f"can't use {where}", expected="lines of `name: value`", got=type(loaded).__name__)
        return cls(**{str(name): value for name, value in loaded.items()})

    def to_dict(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}


def check_hparams(hparams: Any) -> None:
    """Raises HyperParamError for what has no hyperparameters as its attributes, such as a dict."""
    lacking = [name for name in _NEEDED if not hasattr(hparams, name)]
    if lacking:
        raise HyperParamError(
            "hyperparameters are missing: " + ", ".join(lacking),
            expected="PKEHyperParams, or EasyEdit's own of DINM",
            got=type(hparams).__name__,
            do="PKEHyperParams.from_hparams(path or dict)",
        )


def mode_of(hparams: Any) -> str:
    """Parity or fixed; EasyEdit's own hyperparameters may be given the attribute `mode`.

    Raises:
        HyperParamError: neither of them.
    """
    return str(_one_of(MODES)("mode", getattr(hparams, "mode", "fixed")))


def config_of(hparams: Any, method: str, requests: int, layers: list[int]) -> PKEConfig:
    """The settings of an edit in mode "fixed": the method's own, with the hyperparameters in their places.

    Args:
        method: of pke_fast, "pke" or "dinm".
        requests: how many; all of them are in every step.
        layers: where hot spots may be; empty for the method's own window.
    """
    bound = hparams.norm_constraint
    settings: dict[str, Any] = {
        "num_steps": hparams.num_steps,
        "lr": hparams.lr,
        "weight_decay": hparams.weight_decay,
        "w_edit": hparams.kl_factor,
        "w_kl": 1.0,
        "norm_constraint": None if bound is None or bound is False else bound,
        "projections": ("down",),  # rewrite_module_tmp names it, and callers save and put back what it names
        "max_length": hparams.max_length,
        "batch_size": max(1, requests),
        "suffix_system_prompt": "",  # EasyEdit's callers have put it behind the prompt already
    }
    if layers:
        settings["window"] = (min(layers), max(layers) + 1)
    settings |= getattr(hparams, "settings", {})
    config = PKEConfig.preset(method).replace(**settings)
    if method == "pke" and "first_token_weight" not in settings and not wanted(config):
        return config.replace(first_token_weight=WITHOUT_DETECTORS)
    return config


def _has_default(item: dataclasses.Field[Any]) -> bool:
    return item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def _wrong(name: str, value: Any, expected: str) -> HyperParamError:
    got = f"{type(value).__name__} {value!r:.60}"
    return HyperParamError(f"hyperparameter {name} can't be used", expected=expected, got=got)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _wrong(name, value, "a number of 0 or more")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _wrong(name, value, "a number") from None
    if not math.isfinite(number) or number < 0:
        raise _wrong(name, value, "a number of 0 or more")
    return number


def _rate(name: str, value: Any) -> float:
    number = _number(name, value)
    if number > MOST_LR:
        raise _wrong(name, value, f"a number of at most {MOST_LR:g}")
    return number


def _count(name: str, value: Any) -> int:
    number = _number(name, value)
    if not number.is_integer():
        raise _wrong(name, value, "a whole number of 0 or more")
    return int(number)


def _bound(name: str, value: Any) -> Any:
    if value is None or value is False:
        return value
    number = _number(name, value)
    return value if type(value) is int else number  # parity tells 1 from 1.0


def _layers(name: str, value: Any) -> list[int]:
    if not isinstance(value, list | tuple) or any(type(layer) is not int or layer < 0 for layer in value):
        raise _wrong(name, value, "a list of layer numbers")
    return list(value)


def _device(name: str, value: Any) -> int | str:
    return value if isinstance(value, str) else _count(name, value)


def _truth(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(name, value, "text")
    return value


def _model(name: str, value: Any) -> Any:
    pair = isinstance(value, list | tuple) and len(value) == 2
    if not (isinstance(value, str) or pair):
        raise _wrong(name, value, "a model's name, or a tuple (model, tokenizer)")
    return value


def _settings(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(name, value, "settings by name")
    PKEConfig().replace(**value)
    return dict(value)


def _one_of(choices: tuple[str, ...]) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if value not in choices:
            raise _wrong(name, value, "one of " + ", ".join(choices))
        return str(value)

    return check


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "layers": _layers,
    "num_steps": _count,
    "lr": _rate,
    "weight_decay": _number,
    "kl_factor": _number,
    "norm_constraint": _bound,
    "device": _device,
    "alg_name": _one_of(ALGORITHMS),
    "model_name": _model,
    "batch_size": _count,
    "max_length": _count,
    "max_output_length": _count,
    "model_parallel": _truth,
    "fp16": _truth,
    "mode": _one_of(MODES),
    "settings": _settings,
}
