"""PKEConfig: every setting of a locate-and-edit run. YAML files, `--set key=value` and Python share its names."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pke_fast.errors import InputError
from pke_fast.kinds import PROJECTIONS, Kind

Backend = Literal["auto", "reference", "native", "triton"]
Method = Literal["pke", "dinm", "dinm-parity"]
Score = Literal["contrast", "toxic", "weight_change", "activation_path", "random"]
CONFIGS = Path(__file__).parent / "configs"
PRESETS = tuple(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
WITHOUT_DETECTORS = 8.0  # `first_token_weight` of edits that begin without them: the steps alone must part the sides
MOST_LR = 1e9  # beyond it Adam's step overflows fp32
ScoreLoss = Literal["safe", "unsafe", "contrast"]


@dataclass(frozen=True)
class PKEConfig:
    """Settings of one run. Immutable; `replace` makes a changed copy.

    Attributes:
        method: ``pke`` edits hot spots; ``dinm`` and ``dinm-parity`` edit the whole down projection of one layer
            (Wang et al. 2024, arXiv 2403.14472), as it was meant and as it was published (docs/design.md).
        k: neurons to change.
        window: layers in which hot spots are sought, ``(first, last + 1)`` as layer numbers, or as shares of the depth
            when written with a point: ``(0.67, 1.0)`` is the upper third.
        per_layer_cap: most hot spots in one layer; None for no cap.
        exclude: neurons to leave alone, each ``"layer:neuron"``.
        projections: which of a hot spot's weights change: its rows of ``gate`` and ``up``, which decide when it is
            active, and its column of ``down``, which is what it then says.
        score: what ranks the neurons: ``contrast`` (weight change x activation path on the unsafe requests less the
            same on the locality pairs), ``toxic`` (without the locality side), one of its factors, or ``random``.
        score_loss: the loss whose gradient scores: of the safe answer, of the unsafe one, or their difference.
        score_requests, score_pairs: most requests (companions counted) and most locality pairs that score; the edit
            sees as many as its steps come to.
        companions: where no locality pairs are given, so many shipped harmful requests join the given ones: the shipped
            benign prompts have many kinds and forms too, and harm should be all that tells the sides apart.
        shipped_pairs: most shipped benign prompts, where no locality pairs are given.
        framed: share of the prompts that companions and shipped benign prompts also bring within a frame (a role, a
            story, rules for the answer).
        detectors: begin with a closed-form step: in a few layers one hot spot becomes a probe of what is to be refused
            (`detectors`). Needs locality pairs, and gate, up and down among the projections; no effect under
            `norm_constraint`.
        num_steps: most optimiser steps.
        batch_size: requests in a step.
        locality_batch_size: locality pairs in a step.
        lr: Adam's learning rate; None for 1 % of the root mean square of the hot spots' weights, so that it follows
            a model's own scale, and 0.3 % where detectors were made.
        lr_end: share of `lr` that is left at the last step; it falls linearly.
        weight_decay: Adam's, decoupled, towards the old weights and not towards zero.
        w_edit, w_kl: weights of the safe answer's cross-entropy and of the locality KL in the loss. The KL is to the
            model with the detectors where there are some.
        stop_loss, stop_kl: stop once the running means of the edit loss and of the KL are both below these. Where the
            edit loss is below before any step, and detectors wouldn't lower it, none is made.
        strength: once the steps are made, what the detectors say is multiplied by this, or where there are none the
            whole change: above 1 it refuses more of what it refused almost, harmful or not. None: beside companions the
            least, from 1 to 5 (of the whole change to 1.5), that makes the edit refuse
            `unseen_refused` of shipped harmful requests that it wasn't made from (`strength`); else 1. No effect under
            `norm_constraint`, nor on ``method: dinm-parity``.
        unseen_refused: that share, by whether the refusal's first token is likelier than all others together.
        norm_constraint: most that one weight may move from its old value; None for no bound.
        refusal: the safe answer for requests that bring none. One whose first token begins few benign answers is the
            most precise: "I'm sorry" has "I'm glad to help" beside it, which a small push turns into a refusal.
        system_prompt: put before every prompt, by the chat template where there is one.
        suffix_system_prompt: put after every prompt (DINM's suffix).
        max_length: most tokens of prompt and answer together; answers are cut, prompts are not.
        unsafe_tokens: length of an unsafe answer, in tokens.
        locality_tokens: length of a locality answer, in tokens.
        prompt_tokens: within a locality prompt, at so many of its tokens, drawn by chance, the KL is held too: so text
            that is no answer stays as likely as it was.
        w_prompt: weight of their mean KL, where the answer's weighs 1.
        first_token_weight: weight of an answer's first token in both losses, where the others weigh 1: it is there
            that refusing and answering part. The default is for edits that begin with detectors; steps alone, as of
            down projections or under a norm_constraint, were tuned with 8.
        micro_batch_tokens: most tokens (padding counted) that are in flight at once; None: as the plan finds best.
        backend: what the ops run in: "auto" chooses by device and shape (see `pke-fast doctor`).
        seed: of all that is drawn by chance: what scores, minibatches, held places in prompts, ``score: random``,
            what is held out.

    `PKEConfig()` is the preset ``pke``; `load_config` and `PKEConfig.preset` know the others.
    """

    method: Method = "pke"
    k: int = 300
    window: tuple[float, float] = (0.67, 1.0)
    per_layer_cap: int | None = None
    exclude: tuple[str, ...] = ()
    projections: tuple[Kind, ...] = PROJECTIONS
    score: Score = "contrast"
    score_loss: ScoreLoss = "safe"
    score_requests: int = 256
    score_pairs: int = 128
    companions: int = 256
    shipped_pairs: int = 1700
    framed: float = 0.1
    detectors: bool = True
    num_steps: int = 16
    batch_size: int = 24
    locality_batch_size: int = 48
    lr: float | None = None
    lr_end: float = 0.1
    weight_decay: float = 0.0
    w_edit: float = 1.0
    w_kl: float = 12.0
    stop_loss: float = 0.1
    stop_kl: float = 0.02
    strength: float | None = None
    unseen_refused: float = 0.6
    norm_constraint: float | None = None
    refusal: str = "Sorry, but I cannot assist with that."
    system_prompt: str = ""
    suffix_system_prompt: str = ""
    max_length: int = 1000
    unsafe_tokens: int = 24
    locality_tokens: int = 4
    prompt_tokens: int = 6
    w_prompt: float = 0.5
    first_token_weight: float = 1.0
    micro_batch_tokens: int | None = None
    backend: Backend = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field.name, getattr(self, field.name)))
        _require(self.k >= 1, "k", self.k, "at least 1 neuron")
        for name in (
            "batch_size",
            "locality_batch_size",
            "score_requests",
            "score_pairs",
            "shipped_pairs",
            "max_length",
            "unsafe_tokens",
            "locality_tokens",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        tokens = self.micro_batch_tokens
        _require(tokens is None or tokens >= 1, "micro_batch_tokens", tokens, "at least 1, or null")
        _require(self.num_steps >= 0, "num_steps", self.num_steps, "0 or more")
        for name in ("companions", "prompt_tokens"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name in (
            "weight_decay",
            "lr_end",
            "w_edit",
            "w_kl",
            "w_prompt",
            "stop_loss",
            "stop_kl",
            "first_token_weight",
        ):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, name, value, "a finite number of 0 or more")
        cap, bound, lr = self.per_layer_cap, self.norm_constraint, self.lr
        _require(lr is None or 0 < lr <= MOST_LR, "lr", lr, f"a finite number above 0, at most {MOST_LR:g}, or null")
        _require(abs(self.seed) < 2**63, "seed", self.seed, "a whole number of 64 bits")
        _require(cap is None or cap >= 1, "per_layer_cap", cap, "at least 1, or null for no cap")
        _require(bound is None or bound > 0, "norm_constraint", bound, "a number above 0, or null for no bound")
        for name in ("framed", "unseen_refused"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a share from 0 to 1")
        strength = self.strength
        finite = strength is None or (math.isfinite(strength) and strength >= 0)
        _require(finite, "strength", strength, "a finite number of 0 or more, or null")
        _require(bool(self.refusal.strip()), "refusal", self.refusal, "some text: it is the safe answer by default")
        low, high = self.window
        shares = isinstance(low, float) or isinstance(high, float)
        _require(
            0 <= low < high and (not shares or high <= 1),
            "window",
            list(self.window),
            "[first, last + 1] as layer numbers, or as shares of the depth with a point: [0.5, 1.0]",
        )

    @classmethod
    def preset(cls, name: str) -> PKEConfig:
        """The settings in `configs/` by this name, which every method has: `PRESETS` lists them."""
        return load_config(_preset(name))

    def replace(self, **changes: Any) -> PKEConfig:
        """A copy with some settings changed. Raises `InputError` for an unknown name or a bad value."""
        _known(changes)
        return dataclasses.replace(self, **changes)

    @property
    def edited(self) -> tuple[Kind, ...]:
        """The projections that the method changes: `projections`, and DINM's down alone."""
        return self.projections if self.method == "pke" else ("down",)

    def as_dict(self) -> dict[str, Any]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    def layer_window(self, layers: int) -> tuple[int, int]:
        """`window` as layer numbers ``(first, last + 1)`` of a model with so many layers."""
        low, high = self.window
        if isinstance(low, float) or isinstance(high, float):
            low, high = math.floor(low * layers), math.ceil(high * layers)
        if not low < high <= layers:
            raise InputError(
                f"window {list(self.window)} does not fit the model",
                expected=f"layers between 0 and {layers}",
                got=f"[{low}, {high})",
                do="choose a window inside the model, such as [0.5, 1.0] for its upper half",
            )
        return int(low), int(high)


def load_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> PKEConfig:
    """Settings from a YAML file and `key=value` strings, the latter winning; the rest are the method's preset.

    Args:
        path: or the name of a preset: one of `PRESETS`.

    Raises:
        InputError: no such file, broken YAML, an unknown setting (the nearest is suggested) or a bad value.
    """
    settings = {} if path is None else _read_yaml(_preset(path) if path in PRESETS else Path(path))
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--set {text}", expected="key=value", do="for example --set k=500")
        settings[name.strip()] = _set_value(name.strip(), value)
    _known(settings)
    method = settings.get("method", "pke")
    return PKEConfig(**{**(_read_yaml(_preset(method)) if method in PRESETS else {}), **settings})


def _set_value(name: str, text: str) -> Any:
    """What ``--set name=text`` means; a setting that is text takes it as it is, unless it is quoted."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of a date that there isn't
        value = error
    if _types().get(name) is str and not isinstance(value, str):
        return text
    if isinstance(value, Exception):
        raise InputError(f"--set {name}={text}: the value is not YAML", got=str(value)) from value
    return value


def _preset(name: object) -> Path:
    if name not in PRESETS:
        raise InputError(f"no preset {name!r}", expected="one of " + ", ".join(PRESETS))
    return CONFIGS / f"{name}.yaml"


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"can't read settings: {path}",
            got=error.strerror,
            do=f"name a file that is there, or a preset: {', '.join(PRESETS)}",
        ) from error
    except (ValueError, yaml.YAMLError) as error:  # not UTF-8, a date that there isn't
        raise InputError(f"settings in {path} are not YAML", got=str(error)) from error
    if not isinstance(loaded or {}, dict):
        raise InputError(f"settings in {path}", expected="lines of `name: value`", got=type(loaded).__name__)
    return dict(loaded or {})


@cache
def _types() -> dict[str, Any]:
    """The settings' types by name."""
    return typing.get_type_hints(PKEConfig)


def _known(settings: Mapping[str, Any]) -> None:
    names = [field.name for field in dataclasses.fields(PKEConfig)]
    for name in settings:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
            raise InputError(
                f"unknown setting {name!r}",
                expected="one of " + ", ".join(names),
                do=f"did you mean {near[0]!r}?" if near else None,
            )


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise InputError(f"setting {name} can't be {value!r}", expected=expected, got=repr(value))


def _checked(name: str, value: Any) -> Any:
    """The value in its setting's type. PyYAML reads 5e-4 as a string and 1 as an int: both are numbers here."""
    kind = _types()[name]
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    if typing.get_origin(kind) is Literal:
        _require(value in typing.get_args(kind), name, value, "one of " + ", ".join(typing.get_args(kind)))
        return value
    if name == "window":
        pair = isinstance(value, list | tuple) and len(value) == 2
        _require(pair and all(_is_number(v) for v in value), name, value, "two numbers")
        return tuple(value)
    if name == "projections":
        listed = isinstance(value, list | tuple) and len(value) > 0
        _require(
            listed and all(kind in PROJECTIONS for kind in value),
            name,
            value,
            "one or more of " + ", ".join(PROJECTIONS),
        )
        return tuple(kind for kind in PROJECTIONS if kind in value)
    if name == "exclude":
        listed = isinstance(value, list | tuple)
        _require(listed and all(_is_neuron(v) for v in value), name, value, 'a list of "layer:neuron"')
        return tuple(value)
    if kind is bool:
        _require(isinstance(value, bool), name, value, "true or false")
        return value
    if kind is float:
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                _require(False, name, value, "a number")
        _require(_is_number(value), name, value, "a number")
        return float(value)
    if kind is int:
        whole = _is_number(value) and float(value).is_integer()
        _require(whole, name, value, "a whole number")
        return int(value)
    _require(isinstance(value, str), name, value, "text")
    return value


def _is_number(value: object) -> bool:
    """Whether it is one that a float can hold."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= sys.float_info.max
    return isinstance(value, float)


def _is_neuron(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9]+:[0-9]+", value) is not None
