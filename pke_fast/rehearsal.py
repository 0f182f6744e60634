"""A rehearsal: the job's own code run on tensors that have shapes and no data, to see what memory it will take.

Nothing is estimated by formula: what autograd keeps of a layer is counted while the real executor runs a twin of the
model whose weights are torch's fake tensors. It takes seconds and no memory, before anything is loaded. A step that ran
here can't wait for the device either: a fake tensor has no value that could be asked for.
"""

from __future__ import annotations

import copy
import importlib.util
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pke_fast.errors import InputError
from pke_fast.kernels import edit_loss
from pke_fast.structure import Structure, find_structure
from pke_fast.tape import passed_over

LIKE_ALL = 2  # layers, where more do the same again: every other one may attend otherwise

# Ops that need memory within themselves are run here in torch, where it is seen.
_WITHIN = {"pke_fast::edit_loss": edit_loss.reference}


class NotRehearsed(InputError):
    """The model can't be run without data."""


@contextmanager
def _without_data(name: str) -> Iterator[None]:
    """Turns what torch raises where it can't run without data into NotRehearsed."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        raise NotRehearsed(
            f"no plan can be made for {name}",
            expected="a model that torch can run on tensors without data",
            got=str(error),
            do="leave --memory-budget out, and set micro_batch_tokens",
        ) from error


class _Watch(TorchDispatchMode):
    """Counts the bytes of all tensors alive, those that were there before apart."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self._known, self._live = known, {}  # type: tuple[set[int], dict[int, int]]
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked for at every turn; nothing is made
            return args[0].fake_device
        if func.name() in _WITHIN:
            with self:
                return _WITHIN[func.name()](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        self.peak = max(self.peak, self._now)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._live:
            return
        self._live[key] = storage.nbytes()
        self._now += storage.nbytes()
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self._now -= self._live.pop(key)


# Where transformers asks whether a mask is all ones, to do without it; releases of version 5 don't ask a fake tensor.
_ASKING = (
    ("transformers.modeling_attn_mask_utils", "AttentionMaskConverter"),
    ("transformers.masking_utils", None),
)


@contextmanager
def _masked() -> Iterator[None]:
    """No mask is left out: batches are padded, and there is no data to ask."""
    name = "_ignore_causal_mask_sdpa"
    changed = []
    for module, holder in _ASKING:
        if importlib.util.find_spec(module) is None:
            continue
        owner: Any = importlib.import_module(module)
        owner = getattr(owner, holder, None) if holder else owner
        if hasattr(owner, name):
            changed.append((owner, vars(owner)[name]))
            setattr(owner, name, staticmethod(lambda *_args, **_kwargs: False))
    try:
        yield
    finally:
        for owner, own in changed:
            setattr(owner, name, own)


class Twin:
    """A model of the same class and configuration without data.

    Args:
        make: makes the model; called where its tensors get none.
        dtype: of its weights.
        name: what the model is called in errors.

    Attributes:
        structure: of the twin; its tensors may be used within `rehearse` alone.
        weights: bytes of all weights.
        layer_weights: bytes of one decoder layer's weights, the largest's.
        peaks: what was rehearsed so far, for `plan`.

    Raises:
        InputError: the structure isn't one that can be edited.
        NotRehearsed: the model can't be run without data; `rehearse` raises it too.
    """

    def __init__(self, make: Callable[[], Any], dtype: torch.dtype, name: str) -> None:
        self._name = name
        self._mode = FakeTensorMode()
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with _without_data(name), _masked(), self._mode, torch.no_grad():
                model = make().eval().requires_grad_(False)
                self.structure: Structure = find_structure(model, probed=False)
        finally:
            torch.set_default_dtype(default)
        self._known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self.weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        self.layer_weights = max(
            sum(parameter.numel() * parameter.element_size() for parameter in layer.parameters())
            for layer in self.structure.layers
        )
        self.peaks: dict[Any, int] = {}

    def rehearse(self, work: Callable[[Structure], Any], first: int = 0) -> int:
        """The most memory that `work` has in use at once, over the weights, in bytes.

        Args:
            first: the lowest layer that `work` replays. Those below run one after another and keep nothing, so a few
                of them tell what all need.
        """
        with (
            _without_data(self._name),
            _masked(),
            self._mode,
            passed_over(self.structure, range(LIKE_ALL, first)),
            _Watch(self._known) as watch,
        ):
            work(self.structure)
        return watch.peak


_TWINS: dict[tuple[type, str, torch.dtype], Twin] = {}  # one is used again and again by a process


def twin_of(model: Any, dtype: torch.dtype) -> Twin:
    """The twin of a loaded model of transformers, made once."""
    return _kept(type(model), model.config, dtype)


def twin_of_config(config: Any, dtype: torch.dtype) -> Twin:
    """The twin of the causal language model that a configuration of transformers is of, made once.

    Raises:
        NotRehearsed: transformers has no such model; or as `Twin`.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise NotRehearsed(
            f"no plan can be made for {type(config).__name__}",
            expected="the configuration of a causal language model of transformers",
            do="leave --memory-budget out, and set micro_batch_tokens",
        )
    return _kept(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config, dtype)


def _kept(kind: Any, config: Any, dtype: torch.dtype) -> Twin:
    key = (kind, config.to_json_string(use_diff=False), dtype)
    if key not in _TWINS:
        config = copy.deepcopy(config)
        setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", dtype)  # transformers 5, and before
        _TWINS[key] = Twin(lambda: kind(config), dtype, kind.__name__)
    return _TWINS[key]
