"""Where a model keeps its decoder layers and their MLPs: found by structure, then probed against its own output.

Nothing here knows a model family by name. A decoder layer is an item of the one module list that is as long as the
model is deep; its MLP is the module whose own linear children have the shapes of an MLP; what those children are to
each other (which is the gate, which activation is between them) is read off a small forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pke_fast.errors import InputError
from pke_fast.kernels.edit_loss import logits_of
from pke_fast.kernels.glu_score import ACTIVATIONS
from pke_fast.kinds import PROJECTIONS, Kind
from pke_fast.module_calls import first_tensor, hooks, split_hidden
from pke_fast.placement import brought, check_placement, comes_and_goes, device_of, input_device, live_weight

CONFIGURED = {  # what configurations call the activations
    "silu": {"silu", "swish"},
    "gelu": {"gelu"},
    "gelu_tanh": {"gelu_new", "gelu_pytorch_tanh", "gelu_fast"},
    "relu": {"relu"},
    "relu2": {"relu2"},
}
PROBE_TOKENS = 24  # in the forward pass that checks what was found


@dataclass(frozen=True, eq=False)
class MLP:
    """One layer's MLP: out = down(h), h = act(gate(x)) * up(x), or h = act(gate(x)) for a plain one.

    Attributes:
        module: the module that holds the projections.
        down: the down projection; its weight is [d, D] (axis 1) or, as transformers' Conv1D stores it, [D, d] (axis 0).
        gate, up: the projections into the MLP; `up` is None for a plain MLP, and is `gate` for one fused [2D, d].
        names: the names of all its projections' weights, by the module's id.
        act: a name in `ACTIVATIONS`; None where no form gives h, which is then taken at `down`'s input.
    """

    module: nn.Module
    down: nn.Module
    gate: nn.Module
    up: nn.Module | None
    names: Mapping[int, str]
    act: str | None = None

    @property
    def weight(self) -> str:
        """The name of `down`'s weight among the model's parameters."""
        return self.place("down").weight

    @property
    def axis(self) -> int:
        """The dimension of that weight that counts neurons."""
        return self.place("down").axis

    @property
    def fused(self) -> bool:
        """Whether gate and up are one projection, whose output [.., 2D] holds gate's half before up's (Phi-3)."""
        return self.up is self.gate

    def projections(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """gate(x) and up(x), [.., D] each; None for the `up` of a plain MLP, and of a fused one with gate [.., 2D]."""
        return self.gate(x), None if self.up is None or self.fused else self.up(x)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The projections it has, in the order of a patch."""
        return tuple(kind for kind in PROJECTIONS if kind != "up" or self.up is not None)

    def place(self, kind: Kind) -> Place:
        """Where a projection keeps its neurons."""
        module = {"gate": self.gate, "up": self.up, "down": self.down}[kind]
        assert module is not None
        out, _ = _linear_shape(module) or (0, 0)
        offset = out // 2 if kind == "up" and self.fused else 0
        return Place(module, self.names[id(module)], int(transposed(module) != (kind == "down")), offset)


class Place(NamedTuple):
    """Where a projection keeps its neurons: its module, its weight's name, the axis that counts them, and the first."""

    module: nn.Module
    weight: str
    axis: int
    offset: int


@dataclass(frozen=True, eq=False)
class Structure:
    """A model as pke_fast sees it.

    Attributes:
        model: the causal language model of transformers.
        base: the module that holds the decoder layers and runs them; its forward ends before the logits.
        layers: the decoder layers, L of them.
        mlps: their MLPs.
        tail: what runs between the last layer and the head (the final norm), in order.
        head: the output embedding, its weight [V, d].
        scale, soft_cap: logits = soft_cap * tanh(scale * head(x) / soft_cap); soft_cap 0 where there is none.
        hidden_size, neurons: d and D.
        layers_return_tuples: whether a decoder layer returns its hidden state in a tuple.
    """

    model: Any
    base: nn.Module
    layers: nn.ModuleList
    mlps: tuple[MLP, ...]
    tail: tuple[nn.Module, ...]
    head: Any
    scale: float
    soft_cap: float
    hidden_size: int
    neurons: int
    layers_return_tuples: bool

    @property
    def device(self) -> torch.device:
        """Where the tokens go."""
        return input_device(self.model)

    def device_of(self, layer: int) -> torch.device:
        """Where a layer computes."""
        return device_of(self.layers[layer])

    @property
    def lowest_kept(self) -> int:
        """The lowest layer from which on all may keep a graph: that of one whose weights come and go holds them."""
        coming = [index for index, layer in enumerate(self.layers) if comes_and_goes(layer)]
        return coming[-1] + 1 if coming else 0

    @property
    def head_device(self) -> torch.device:
        """Where the head computes, and the losses are."""
        return device_of(self.head)

    @property
    def dtype(self) -> torch.dtype:
        weight = self.mlps[0].down.weight
        assert isinstance(weight, Tensor)
        return weight.dtype

    def down_weight(self, layer: int) -> Tensor:
        """The live weight, in the host's memory where accelerate brings it from there (`live_weight`)."""
        return live_weight(self.mlps[layer].down, "weight")

    def finish(self, hidden: Tensor) -> Tensor:
        """The head's input from the last layer's output."""
        for module in self.tail:
            hidden = module(hidden)
        return hidden


def find_structure(model: Any, *, probed: bool = True) -> Structure:
    """Finds and probes the structure of a causal language model.

    Args:
        probed: compare what was found with the model's own output. Without it the activation is taken from the
            configuration, and nothing is computed: for a model whose tensors hold no data (`rehearsal`).

    Raises:
        InputError: the structure isn't one of those known (it says what was looked for), or the probe disagrees.
    """
    config = _text_config(model)
    hidden_size, depth = config.hidden_size, config.num_hidden_layers
    base, layers = _find_layers(model, depth)
    check_placement(model, layers)
    mlps = list(find_mlps(model))
    widths = {(_linear_shape(mlp.down) or (0, 0))[1] for mlp in mlps}
    if len(widths) != 1:
        raise InputError(
            f"the MLPs of {type(model).__name__} differ in width",
            expected="the same number of neurons in every layer",
            got=", ".join(str(width) for width in sorted(widths)),
        )
    dtypes = {mlp.down.weight.dtype for mlp in mlps}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        raise InputError(
            f"the down projections of {type(model).__name__} can't be edited in their dtype",
            expected="fp32, bf16 or fp16, the same in every layer",
            got=", ".join(sorted(str(dtype) for dtype in dtypes)),
        )
    if len({mlp.weight for mlp in mlps}) < depth:
        raise InputError(
            f"layers of {type(model).__name__} share their down projection", do="such a model can't be edited"
        )
    head = model.get_output_embeddings()
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise InputError(f"{type(model).__name__} has no output embedding", expected="a head with a weight [V, d]")
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    soft_cap = float(getattr(config, "final_logit_softcapping", None) or 0.0)  # Gemma 2
    probe = _probe(model, base, layers, mlps, head, scale, soft_cap, config, probed)
    return Structure(
        model, base, layers, probe.mlps, probe.tail, head, scale, soft_cap, hidden_size, widths.pop(), probe.tuples
    )


def find_mlps(model: Any) -> tuple[MLP, ...]:
    """The MLP of every layer by its shapes alone, not probed: also of a model on the meta device.

    Raises:
        InputError: the layers or their MLPs aren't found; it says what was looked for.
    """
    config = _text_config(model)
    _, layers = _find_layers(model, config.num_hidden_layers)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return tuple(_find_mlp(layer, config.hidden_size, names, index) for index, layer in enumerate(layers))


def _text_config(model: Any) -> Any:
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def _find_layers(model: nn.Module, depth: int) -> tuple[nn.Module, nn.ModuleList]:
    found = [
        (parent, child)
        for parent in model.modules()
        for child in parent.children()
        if isinstance(child, nn.ModuleList) and len(child) == depth and _has_parameters(child)
    ]
    if len(found) != 1:
        raise InputError(
            f"can't find the decoder layers of {type(model).__name__}",
            expected=f"one ModuleList of {depth} layers (config.num_hidden_layers)",
            got=f"{len(found)} of that length",
            do="pke_fast edits decoder-only models (Llama, Mistral, Qwen, Gemma, GPT-2, GPT-NeoX and the like)",
        )
    return found[0]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def transposed(module: nn.Module) -> bool:
    """Whether its weight is [in, out], as that of transformers' Conv1D."""
    return type(module).__name__ == "Conv1D"


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer, of transformers' transposed Conv1D too."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return None
    rows, columns = weight.shape
    return (columns, rows) if transposed(module) else (rows, columns)


def _find_mlp(layer: nn.Module, d: int, names: dict[int, str], index: int) -> MLP:
    """The MLP of a layer by the shapes of its linear children; modules named like an MLP are tried first."""

    def named_like_mlp(item: tuple[str, nn.Module]) -> bool:
        return not any(part in item[0].lower() for part in ("mlp", "feed_forward", "ffn", "ff"))

    dense = [(name, module) for name, module in layer.named_modules() if "expert" not in name]
    for _, module in sorted(dense, key=named_like_mlp):
        linears = [(name, child, shape) for name, child in module.named_children() if (shape := _linear_shape(child))]
        if len(linears) not in (2, 3):
            continue
        *inputs, (_, down, (out, width)) = linears
        shapes = [shape for _, _, shape in inputs]
        if out != d or any(into != d for _, into in shapes):
            continue
        gate, up = inputs[0][1], None
        if len(shapes) == 2 and shapes[0][0] == shapes[1][0] == width:
            gate, up = (entry[1] for entry in sorted(inputs, key=lambda entry: "gate" not in entry[0]))
        elif len(shapes) == 1 and shapes[0][0] == 2 * width:
            up = gate
        elif not (len(shapes) == 1 and shapes[0][0] == width):
            continue
        for what, projection in (("down", down), ("gate", gate), ("up", up)):
            if projection is not None and id(projection.weight) not in names:
                raise InputError(
                    f"the {what} projection of layer {index} has no plain weight", do="remove its parametrisation"
                )
        own = {id(projection): names[id(projection.weight)] for projection in (gate, up, down) if projection}
        return MLP(module, down, gate, up, own)
    listing = ", ".join(
        f"{name} {list(shape)}" for name, module in layer.named_modules() if (shape := _linear_shape(module))
    )
    raise InputError(
        f"can't find the MLP of layer {index} ({type(layer).__name__})",
        expected=f"a module with linear children gate and up [D, {d}] (or one [D, {d}], or fused [2D, {d}]),"
        f" then down [{d}, D]",
        got=listing or "no linear layers",
        do="mixture-of-experts, quantised and sharded MLPs aren't supported here",
    )


@dataclass
class _Probe:
    mlps: tuple[MLP, ...]
    tail: tuple[nn.Module, ...]
    tuples: bool


def _probe(
    model: Any,
    base: nn.Module,
    layers: nn.ModuleList,
    mlps: list[MLP],
    head: Any,
    scale: float,
    soft_cap: float,
    config: Any,
    probed: bool,
) -> _Probe:
    """One small forward pass that checks all that was found, and reads the activations and the tail off it."""
    name = type(model).__name__
    outputs: dict[int, Tensor] = {}  # id of a projection -> its output
    inputs: dict[int, list[Tensor]] = {}  # id of a down projection, or of the head -> its inputs
    chain: list[nn.Module] = []
    current: list[Tensor] = []  # what the last layer, then each module of the tail, returned
    dependent: list[int] = []
    tuples: list[bool] = []

    def keep_output(module: nn.Module, _args: Any, output: Any) -> None:
        outputs[id(module)] = first_tensor(output).detach()

    def keep_input(module: nn.Module, args: Any) -> None:
        inputs.setdefault(id(module), []).append(args[0].detach())

    def check_call(index: int) -> Any:
        def check(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            _, rest, named = split_hidden(args, kwargs)
            if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((rest, named))):
                dependent.append(index)
            return attach(_module, args, kwargs)

        return check

    def leave_last(_module: nn.Module, _args: Any, output: Any) -> None:
        current.append(first_tensor(output))
        tuples.append(isinstance(output, tuple))

    def follow(module: nn.Module, args: Any, output: Any) -> None:
        if current and args and args[0] is current[-1] and isinstance(output, Tensor):
            chain.append(module)
            current.append(output)

    def attach(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden, rest, named = split_hidden(args, kwargs)
        # So that whatever follows from it can be told; anew for each layer, or weights brought for one would stay.
        hidden = hidden.detach().requires_grad_()
        return ((hidden, *rest), named) if args else ((), {**named, "hidden_states": hidden})

    projections = {id(p): p for mlp in mlps for p in (mlp.gate, mlp.up, mlp.down, mlp.module) if p is not None}
    handles = [p.register_forward_hook(keep_output) for p in projections.values()]
    handles += [module.register_forward_pre_hook(keep_input) for module in (*(mlp.down for mlp in mlps), head)]
    handles.append(layers[0].register_forward_pre_hook(attach, with_kwargs=True))
    handles += [
        layer.register_forward_pre_hook(check_call(index), with_kwargs=True)
        for index, layer in enumerate(layers)
        if index > 0
    ]
    handles.append(layers[-1].register_forward_hook(leave_last))
    handles += [child.register_forward_hook(follow) for child in base.children() if child is not layers]
    device = input_device(model)
    ids = torch.arange(PROBE_TOKENS, device=device).reshape(2, -1) * 37 % config.vocab_size
    with hooks(*handles), torch.enable_grad():
        call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False, "return_dict": True}
        logits = model(**call).logits.detach().float()

    if dependent:
        raise InputError(
            f"{name} hands layer {dependent[0]} a tensor computed from earlier layers besides the hidden state",
            do="this architecture can't be replayed layer by layer: its gradients would be wrong, so it is refused",
        )
    if id(head) not in inputs or not current or (probed and not _same(inputs[id(head)][-1], current[-1])):
        raise InputError(
            f"can't follow the hidden state of {name} from its last layer to its head",
            expected="a chain of modules (the final norm), then the output embedding",
            got=" -> ".join(type(module).__name__ for module in chain) or "nothing after the last layer",
        )
    if not probed:
        return _Probe(tuple(_with_configured_activation(mlp, config) for mlp in mlps), tuple(chain), tuples[0])
    with brought(head):
        last = inputs[id(head)][-1].to(device_of(head))
        ours = logits_of(last, head.weight, getattr(head, "bias", None), scale, soft_cap).to(logits.device)
    if not _close(ours, logits, head.weight.dtype):
        raise InputError(
            f"the logits of {name} aren't its head applied to its last hidden state",
            expected="head(x), scaled by config.logit_scale or capped by config.final_logit_softcapping",
            got=f"a difference of up to {(ours - logits).abs().max():.3g}",
        )
    return _Probe(tuple(_with_activation(mlp, outputs, inputs) for mlp in mlps), tuple(chain), tuples[0])


def _with_configured_activation(mlp: MLP, config: Any) -> MLP:
    """The MLP with the activation that the configuration names."""
    names = ("hidden_act", "hidden_activation", "activation_function")
    named = {getattr(config, name, None) for name in names}
    return replace(mlp, act=next((act for act, known in CONFIGURED.items() if named & known), None))


def _with_activation(mlp: MLP, outputs: dict[int, Tensor], inputs: dict[int, list[Tensor]]) -> MLP:
    """The MLP with its activation, where act(gate) * up gives the down projection's input; else with none."""
    seen = inputs.get(id(mlp.down), [])
    if len(seen) != 1 or seen[0].numel() != PROBE_TOKENS * _linear_shape(mlp.down)[1]:  # type: ignore[index]
        raise InputError(
            f"the down projection {mlp.weight} doesn't run exactly once on every token",
            do="mixture-of-experts models aren't supported here",
        )
    if not torch.equal(outputs[id(mlp.module)], outputs[id(mlp.down)]):
        return mlp  # the module does more than an MLP (OPT's is the decoder layer itself): only `down` is ours
    h = seen[0].float()
    forms: list[tuple[nn.Module, nn.Module | None, Tensor, Tensor | None]]
    if mlp.up is None:
        forms = [(mlp.gate, None, outputs[id(mlp.gate)], None)]
    elif mlp.up is mlp.gate:
        a, b = outputs[id(mlp.gate)].chunk(2, -1)
        forms = [(mlp.gate, mlp.up, a, b)]
    else:
        a, b = outputs[id(mlp.gate)], outputs[id(mlp.up)]
        forms = [(mlp.gate, mlp.up, a, b), (mlp.up, mlp.gate, b, a)]
    fits = []
    for gate_module, up_module, gate, up in forms:
        for act, function in ACTIVATIONS.items():
            product = (function(gate) if up is None else function(gate) * up).float()
            if product.shape == h.shape and _close(product, h, seen[0].dtype):
                fits.append((float((product - h).abs().max()), gate_module, up_module, act))
    if not fits:
        return mlp
    _, gate_module, up_module, act = min(fits, key=lambda fit: fit[0])  # the two gelus can both be close
    return replace(mlp, gate=gate_module, up=up_module, act=act)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b.to(a.device))


def _close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to a few roundings of the dtype, relative to the largest value."""
    tolerance = 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1e-6))
