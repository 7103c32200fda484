"""A stack of layers that are alike is traced as its first three; the nodes of the others are copies of the third's. Own.

torch.onnx.export takes two seconds a layer. Nothing is assumed of what a layer computes: the nodes of the second and of the
third have to be the same but for the parameters, and for what one layer hands to the next, which that comparison finds. The
layers behind them have to be the same modules with the same settings. Wherever one of this does not hold, all are traced.

Leaves out: stacks of several kinds of layers in turn (sliding windows).
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ...surgery import transformer_layers

TRACED = 3
_SCOPES = "pkg.torch.onnx.name_scopes"  # of a node: the dotted names of the modules that it was traced in
# settings that say where a layer is, and by which its cache finds its keys
_PLACES = ("layer_idx", "layer_id", "layer_number")
# sums of sizes come with their terms in any order
_EITHER_ORDER = ("Add", "Mul")
_BY_TORCH = frozenset(vars(nn.Module()))
# a model's collections that say nothing of layers, beside those that begin with an underscore
_BY_TRANSFORMERS = ("all_tied_weights_keys",)
_SEVERAL = (list, tuple, set, frozenset, dict)


@dataclass(frozen=True)
class Stack:
    """Attributes:
    path: dotted name of the list of layers. count: of layers.
    """

    path: str
    count: int


def find_stack(model: Any) -> Stack | None:
    """The longest list of layers, where all but the first are alike and nothing around it speaks of single ones."""
    try:
        names, layers = zip(*transformer_layers(model), strict=True)
    except ValueError:  # there is no list
        return None
    if len(layers) <= TRACED + 1:
        return None
    path = names[0].rpartition(".")[0]
    parents = [model.get_submodule(path[:end]) for end in range(len(path)) if end == 0 or path[end] == "."]
    own = [name for each in parents for name, value in _settings(each).items() if isinstance(value, _SEVERAL) and value]
    config = _settings(model.config.get_text_config())
    if any(name[0] != "_" and name not in _BY_TRANSFORMERS for name in own):
        return None
    if any(_tells_layers_apart(name, value, len(layers)) for name, value in config.items()):
        return None
    return Stack(path, len(layers)) if all(_alike(layers[1], layer) for layer in layers[2:]) else None


def _settings(owner: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(owner).items() if name not in _BY_TORCH and name not in _PLACES}


def _tells_layers_apart(name: str, value: Any, count: int) -> bool:
    """Whether a field of a config may say something of single layers: not the same of each, or numbers of some."""
    if not isinstance(value, _SEVERAL) or not value or "token" in name:
        return False
    if isinstance(value, (list, tuple)) and len(value) == count:
        return not all(_equals(each, value[1]) for each in value[2:])
    numbers = not isinstance(value, dict) and all(isinstance(each, int) and each < count for each in value)
    return numbers or "layer" in name


def _equals(one: Any, other: Any) -> bool:
    try:
        return one is other or (type(one) is type(other) and bool(one == other))
    except (TypeError, ValueError, RuntimeError):  # arrays and tensors have no one answer
        return False


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same submodules, settings, buffers and kinds of parameters, and no hooks."""
    modules, others = dict(one.named_modules()), dict(other.named_modules())
    buffers, other_buffers = dict(one.named_buffers()), dict(other.named_buffers())
    if modules.keys() != others.keys() or _kinds(buffers) != _kinds(other_buffers):
        return False
    pairs = [(each, others[name]) for name, each in modules.items()]
    return (
        _kinds(dict(one.named_parameters())) == _kinds(dict(other.named_parameters()))
        and all(torch.equal(value, other_buffers[name]) for name, value in buffers.items())
        and all(type(a) is type(b) and _same_settings(a, b) for a, b in pairs)
        and not any(each._forward_hooks or each._forward_pre_hooks for pair in pairs for each in pair)
    )


def _kinds(tensors: dict[str, Any]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (each.shape, each.dtype) for name, each in tensors.items()}


def _same_settings(one: nn.Module, other: nn.Module) -> bool:
    a, b = _settings(one), _settings(other)
    return a.keys() == b.keys() and all(_equals(value, b[name]) for name, value in a.items())


@contextlib.contextmanager
def shortened(model: Any, stack: Stack) -> Iterator[None]:
    """The model with the first layers of its stack alone. Its config goes on to name all of them: a forward may compute with
    their number."""
    layers = model.get_submodule(stack.path)
    model.set_submodule(stack.path, nn.ModuleList([*layers][:TRACED]))
    try:
        yield
    finally:
        model.set_submodule(stack.path, layers)


@dataclass
class _Layer:
    """The third layer's part of a graph, and how it answers to the second's.

    Attributes:
        nodes: in the order of the graph.
        names: beginnings of the names of its parameters, inputs and outputs, with {} for its number.
        before: all values that the second layer makes. image: each of them, as far as compared -> the same of the third.
        carried: those that the third reads -> what the second reads in their place.
    """

    nodes: list[Any]
    names: tuple[str, ...]
    before: frozenset[Any]
    image: dict[Any, Any] = field(default_factory=dict)
    carried: dict[Any, Any] = field(default_factory=dict)

    def named(self, name: str, index: int) -> str | None:
        """What the layer of that index calls its counterpart of the third's `name`; None where that is not its own."""
        for template in self.names:
            own = template.format(TRACED - 1)
            if name.startswith(own):
                return template.format(index) + name[len(own) :]
        return None

    def follows(self, one: Any, other: Any) -> bool:
        """Whether the node `other` of the third layer is what `one` is in the second; remembers what it makes."""
        if _kind(one) != _kind(other):
            return False
        for inputs in (other.inputs, other.inputs[::-1])[: 1 + (other.op_type in _EITHER_ORDER)]:
            pairs = [*zip(one.inputs, inputs, strict=True)]
            if all(self._takes(value, of) for value, of in pairs):
                self.image.update(zip(one.outputs, other.outputs, strict=True))
                self.carried.update((of, value) for value, of in pairs if of in self.before)
                return all(map(self._ends_alike, one.outputs, other.outputs))
        return False

    def _takes(self, value: Any, other: Any) -> bool:
        """Whether the third layer may read `other` where the second reads `value`."""
        if value is None or other is None or value is other or value in self.image:
            return self.image.get(value, value) is other
        if other in self.before:  # what the second layer hands on
            return self.carried.get(other, value) is value
        if self.named(other.name, TRACED - 2) == value.name:
            return True
        # numbers that were written out once for each layer
        return value.const_value is not None and other.const_value is not None and _equal(value, other)

    def _ends_alike(self, value: Any, other: Any) -> bool:
        """Whether both or neither are outputs of the graph, and named as such."""
        if not value.is_graph_output():
            return not other.is_graph_output()
        return other.is_graph_output() and self.named(other.name, TRACED - 2) == value.name


def _equal(one: Any, other: Any) -> bool:
    a, b = one.const_value.numpy(), other.const_value.numpy()
    return a.dtype == b.dtype and np.array_equal(a, b)


def _kind(node: Any) -> tuple[Any, ...]:
    attributes = {name: (each.type, each.value) for name, each in node.attributes.items()}
    return node.domain, node.op_type, node.overload, len(node.inputs), len(node.outputs), attributes


def _of_layer(graph: Any, names: tuple[str, ...], index: int) -> list[Any]:
    """The nodes that were traced in a layer, and those of no layer that work for it alone: on sizes of its keys, or put in by
    the optimizer."""
    stack, own_names = names[0].removesuffix("{}."), tuple(name.format(index) for name in names)
    found, unclear = set(), []
    own = {value for value in graph.inputs if value.name.startswith(own_names)}
    for node in graph:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        if f"{stack}{index}" in scopes:
            found.add(node)
        elif own.intersection(node.inputs) and not any(scope.startswith(stack) for scope in scopes):
            unclear.append(node)
        else:
            continue
        own.update(node.outputs)
    for node in reversed(unclear):
        users = {user for value in node.outputs for user, _ in value.uses()}
        if users and found.issuperset(users):
            found.add(node)
    return [node for node in graph if node in found]


def _third_layer(graph: Any, names: tuple[str, ...]) -> _Layer | None:
    """Compares the second and the third layer; None where they differ in more than a copy could follow."""
    second, third = (_of_layer(graph, names, TRACED - back) for back in (2, 1))
    layer = _Layer(third, names, frozenset(value for node in second for value in node.outputs))
    if not third or len(second) != len(third) or not all(map(layer.follows, second, third)):
        return None
    inside, handed = {*second, *third}, {layer.image[value] for value in layer.carried}
    ends = all(user in inside for value in layer.image for user, _ in value.uses())
    hands = all(user in inside or value in handed for value in layer.image.values() for user, _ in value.uses())
    return layer if layer.carried and ends and hands else None


def repeat(graph: Any, stack: Stack, prefix: str, per_layer: tuple[str, ...]) -> bool:
    """Appends the layers that were not traced. False, and the graph as it was, where they would not be copies.

    Args:
        graph: an onnxscript.ir.Graph of the `shortened` model. prefix: of the names of its modules.
        per_layer: beginnings of the names of inputs and outputs that each layer has, with {} for its number.
    """
    layer = _third_layer(graph, (f"{prefix}{stack.path}.{{}}.", *per_layer))
    if layer is None:
        return False
    inside, last = {*layer.nodes}, layer.nodes[-1]
    handed = {value: layer.image[value] for value in layer.carried}
    users = [(value, use) for value, of_third in handed.items() for use in of_third.uses() if use[0] not in inside]
    for index in range(TRACED, stack.count):
        nodes, made = _copies(graph, layer, index, handed)
        graph.insert_after(last, nodes)
        last, handed = nodes[-1], {value: made[layer.image[value]] for value in layer.carried}
    for value, (user, place) in users:
        user.replace_input_with(place, handed[value])
    return True


def _copies(graph: Any, layer: _Layer, index: int, handed: dict[Any, Any]) -> tuple[list[Any], dict[Any, Any]]:
    """The nodes of one more layer, and value of the third layer -> the same of this one.

    Args:
        handed: value of the second layer that the third reads -> what this one reads in its place.
    """
    from onnxscript import ir  # pyright: ignore[reportMissingImports]

    made: dict[Any, Any] = {}

    def make(value: Any, name: str) -> Any:
        made[value] = ir.Value(name=name, shape=value.shape, type=value.type)
        return made[value]

    def read(value: Any) -> Any:
        """What this layer reads where the third reads `value`."""
        if value is None or value in made or value in handed:
            return made.get(value, handed.get(value))
        name = layer.named(value.name, index)
        if name is None or value.producer() is not None:
            return value
        if value.is_graph_input():
            graph.inputs.append(make(value, name))
        else:
            graph.initializers[name] = make(value, name)
            made[value].const_value = value.const_value  # of a buffer: those of all layers are equal
        return made[value]

    nodes = []
    for node in layer.nodes:
        inputs = [read(value) for value in node.inputs]
        outputs = [make(value, layer.named(value.name, index) or f"{value.name}.{index}") for value in node.outputs]
        graph.outputs.extend(made[value] for value in node.outputs if value.is_graph_output())
        what = node.domain, node.op_type, inputs, node.attributes.values()
        name = f"{node.name}.{index}"
        nodes.append(ir.Node(*what, overload=node.overload, outputs=outputs, version=node.version, name=name))
    return nodes, made
