"""SafeTune's PKE on pke_fast: the same arguments, rows, losses and weights, with state for the located rows alone.

`from pke_fast.frontends.safetune import apply_pke` takes the place of SafeTune's; `register()` adds the recovery method
`pke-fast` to an installed SafeTune. docs/frontends.md says what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from torch import nn

from pke_fast.errors import InputError
from pke_fast.frontends.drifted_rows import PKEConfig, ToxicNeuronLocator
from pke_fast.frontends.row_editing import HARMFUL_PROMPT, SAFE_RESPONSE, PKEGradientEditor

__all__ = ["PKEConfig", "PKEGradientEditor", "PKETrainer", "ToxicNeuronLocator", "apply_pke", "register"]

ALIAS, TRAINER = "pke-fast", "PKEFastTrainer"


def apply_pke(
    model: nn.Module,
    clean: nn.Module,
    toxic: nn.Module,
    top_k_neurons: int = 50,
    target_layers: Sequence[int] | None = None,
    toxicity_weight: float = 1.0,
    max_edit_magnitude: float | None = 1.0,
    *,
    tokenizer: Any = None,
    harmful_prompt: str = HARMFUL_PROMPT,
    safe_response: str = SAFE_RESPONSE,
    locality_inputs: Sequence[str] | None = None,
    num_steps: int = 10,
    lr: float = 5e-4,
    kl_factor: float = 0.1,
    norm_constraint: bool = False,
    max_len: int = 64,
    **extra: Any,
) -> nn.Module:
    """Locates the rows that drifted from `clean` to `toxic`, and teaches those of `model` to refuse.

    Args:
        model: edited in place; see `PKEGradientEditor`.
        clean, toxic: two checkpoints of it, which may be `model` itself.
        others: as `PKEConfig` and `PKEGradientEditor.apply_edits`; texts that aren't given are this project's own.
        extra: accepted, without effect.

    Returns:
        the same model.

    Raises:
        InputError: an argument can't be used; the model is unchanged.
        EditError: a loss became NaN; the weights were put back.
    """
    if tokenizer is None:
        raise InputError("no tokenizer", expected="tokenizer=..., which the texts are encoded by")
    config = PKEConfig(
        top_k_neurons,
        target_layers,
        toxicity_weight,
        max_edit_magnitude,
        num_steps,
        lr,
        kl_factor,
        norm_constraint,
        max_len,
    )
    locator = ToxicNeuronLocator(config)
    rows = locator.locate_by_weight_change(clean.state_dict(), toxic.state_dict())
    if not locator.differ:
        raise InputError("clean and toxic have the same weights", expected="two checkpoints, which tell what drifted")
    PKEGradientEditor(model, rows, tokenizer, config).apply_edits(harmful_prompt, safe_response, locality_inputs)
    return model


_OVERRIDABLE = ("top_k_neurons", "num_steps", "harmful_prompt", "safe_response", "locality_inputs")


class _Trainer:
    """What PKETrainer and the trainer registered with SafeTune share; their other base class holds the model."""

    METHOD = "PKETrainer"
    model: Any
    model_id: Any
    _load_tokenizer: Callable[[], Any]

    def __init__(
        self,
        model: Any = None,
        *,
        clean_model: Any = None,
        toxic_model: Any = None,
        top_k_neurons: int = 50,
        num_steps: int = 10,
        tokenizer: Any = None,
        harmful_prompt: str | None = None,
        safe_response: str | None = None,
        locality_inputs: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)  # type: ignore[call-arg]
        self.clean_model, self.toxic_model, self.tokenizer = clean_model, toxic_model, tokenizer
        self.top_k_neurons, self.num_steps, self.locality_inputs = top_k_neurons, num_steps, locality_inputs
        self.harmful_prompt, self.safe_response = harmful_prompt, safe_response

    def apply(self, *, tokenizer: Any = None, **overrides: Any) -> Any:
        """Edits the model in place and returns it; writes nothing.

        Args:
            overrides: of `top_k_neurons`, `num_steps`, `harmful_prompt`, `safe_response` and `locality_inputs`, in
                place of those given at first; others are accepted, without effect.

        Raises:
            InputError: a model isn't there, or as `apply_pke`.
        """
        for name in ("clean_model", "toxic_model"):
            if getattr(self, name) is None:
                raise InputError(f"no {name}", expected="two checkpoints to compare", do=f"give {name}=...")
        given: dict[str, Any] = {}
        for name in _OVERRIDABLE:
            value = getattr(self, name) if overrides.get(name) is None else overrides[name]
            if value is not None:
                given[name] = value
        model, encoder = self.model, self.tokenizer if tokenizer is None else tokenizer
        if encoder is None:
            encoder = self._load_tokenizer()
        return apply_pke(model, self.clean_model, self.toxic_model, tokenizer=encoder, **given)


class _Holder:
    """A model, or the name that it is loaded by when it is first asked for."""

    def __init__(self, model: Any = None, *, model_id: Any = None, results_dir: Any = None, **kwargs: Any) -> None:
        self.model_id, self.results_dir = model_id, results_dir
        self._model, self._loaded_tokenizer = model, None

    @property
    def model(self) -> Any:
        if self._model is None:
            from pke_fast.loading import load_model

            if self.model_id is None:
                raise InputError("no model", expected="a model, or model_id=...")
            loaded = load_model(str(self.model_id))
            self._model, self._loaded_tokenizer = loaded.model, loaded.tokenizer
        return self._model

    def _load_tokenizer(self) -> Any:
        """The tokenizer of the model that was loaded by its name; None for one that was given."""
        return self._loaded_tokenizer


class PKETrainer(_Trainer, _Holder):
    """SafeTune's trainer of that name, without SafeTune: `PKETrainer(model, clean_model=..., ...).apply()`.

    Args:
        model: the model to edit; None: `model_id` is loaded by `pke_fast.load_model`, its tokenizer too.
        results_dir: kept; nothing is written.
        others: as `apply_pke`.
    """


def register() -> type:
    """Adds `pke-fast` to an installed SafeTune's recovery methods, and returns the trainer class.

    Raises:
        InputError: SafeTune isn't installed.
    """
    try:
        registry = import_module("safetune.runner._registry")
        recover = import_module("safetune.runner.recover")
        base = import_module("safetune.runner.recover._base")._RecoverBase
    except ImportError as error:
        raise InputError(
            "SafeTune can't be imported",
            got=str(error),
            do="install it, or use apply_pke and PKETrainer of this module",
        ) from error

    class PKEFastTrainer(_Trainer, base):  # type: ignore[misc,valid-type]
        """PKE by pke_fast."""

        METHOD = TRAINER

        def _load_tokenizer(self) -> Any:
            return import_module("safetune.runner.utils.model_utils").load_tok(self.model_id)

    setattr(recover, TRAINER, PKEFastTrainer)
    registry.register_recover(ALIAS, TRAINER)
    return PKEFastTrainer
