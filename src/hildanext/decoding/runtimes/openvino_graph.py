"""OpenVINO graphs: fewer and larger products, gated changes joined to their layers, int8 weights."""

from __future__ import annotations

from collections import defaultdict
from typing import Literal, NamedTuple

import numpy as np
import openvino as ov
from openvino import opset15 as ops

Weights = Literal["native", "int8"]


def simplify(graph: ov.Model, weights: Weights) -> None:
    """Merge the linear layers that read the same tensor into one, in place. `weights` "int8": store them as int8.

    Each layer costs about 30 microseconds besides its multiplication. A transformer block has seven and needs four.
    """
    for op in graph.get_ordered_ops():
        # Scalars converted in the graph prevent OpenVINO from fusing the rotary position embedding.
        if (
            op.get_type_name() in ("Convert", "ConvertLike")
            and op.input_value(0).get_node().get_type_name() == "Constant"
        ):
            value = op.input_value(0).get_node().get_data()
            if value.size == 1:
                op.output(0).replace(ops.constant(value.astype(np.float32)).output(0))
    groups: dict[tuple[str, int], list[ov.Node]] = defaultdict(list)
    for op in graph.get_ordered_ops():
        if op.get_type_name() == "MatMul" and op.input_value(1).get_node().get_type_name() == "Constant":
            source = op.input_value(0)
            groups[source.get_node().get_friendly_name(), source.get_index()].append(op)
    for group in groups.values():
        source = group[0].input_value(0)
        changes = {op: change for op in group if (change := low_rank_change(op))}
        layers = [op for op in group if op not in changes]
        weight = np.concatenate([matrix(op) for op in layers])
        if changes:
            source, added = with_changes(source, layers, changes, np.abs(weight).max(-1))
            weight = np.concatenate([weight, added], axis=1)
        joined = ops.matmul(source, weight_node(weight, weights), False, True)
        for op, output in zip(layers, split(joined, [len(matrix(op)) for op in layers]), strict=True):
            op.output(0).replace(output)
    graph.validate_nodes_and_infer_types()


class Change(NamedTuple):
    """A low-rank change in a graph: A x, times the gate, times B, added to a layer's output."""

    gate: ov.Output
    up: ov.Node  # the product with B
    add: ov.Node
    layer: str  # name of the layer's product


def low_rank_change(op: ov.Node) -> Change | None:
    """The change whose A is the weight of `op`; None for any other product."""
    path = [op]
    for kind in ("Multiply", "MatMul", "Add"):
        readers = list(path[-1].output(0).get_target_inputs())
        if len(readers) != 1 or readers[0].get_node().get_type_name() != kind:
            return None
        path.append(readers[0].get_node())
    _, scale, up, add = path
    gate = next(scale.input_value(i) for i in (0, 1) if scale.input_value(i).get_node() != op)
    has_weight = up.input_value(1).get_node().get_type_name() == "Constant"
    if gate.get_node().get_type_name() != "Parameter" or not has_weight:
        return None
    layer = next(add.input_value(i).get_node() for i in (0, 1) if add.input_value(i).get_node() != up)
    while layer.get_type_name() != "MatMul":  # an Add of the bias
        layer = layer.input_value(0).get_node()
    return Change(gate, up, add, layer.get_friendly_name())


def matrix(op: ov.Node) -> np.ndarray:
    """The constant weight of a product, [out, in]."""
    value = op.input_value(1).get_node().get_data()
    return value if op.get_attributes()["transpose_b"] else value.T


def with_changes(
    source: ov.Output, layers: list[ov.Node], changes: dict[ov.Node, Change], largest: np.ndarray
) -> tuple[ov.Output, np.ndarray]:
    """The layers' input x with the gated A x of all changes behind it, and the columns B [out, ranks] that these meet.

    [W B] [x ; g A x] is one large product; W x + B (g A x) is two, and takes a CPU twice as long as the gate should.
    changes: by the product with A. largest [out]: of each row of W in absolute value. A and B are scaled so that no
    column of B is larger: int8 weights keep the scales of W, and rows with a closed gate those of the base.
    """
    sizes, names = [len(matrix(op)) for op in layers], [layer.get_friendly_name() for layer in layers]
    downs, ups = [], []
    for op, change in changes.items():
        index = names.index(change.layer)
        first = sum(sizes[:index])
        up, down = matrix(change.up), matrix(op)
        scale = np.maximum(np.abs(up / largest[first : first + sizes[index], None].clip(1e-12)).max(0), 1e-12)
        spread = np.zeros((sum(sizes), up.shape[1]), dtype=np.float32)
        spread[first : first + sizes[index]] = up / scale
        ups.append(spread)
        downs.append(down * scale[:, None])
        other = next(i for i in (0, 1) if change.add.input_value(i).get_node() != change.up)
        change.add.output(0).replace(change.add.input_value(other))
    gate = next(iter(changes.values())).gate
    low = ops.matmul(source, ops.constant(np.concatenate(downs)), False, True)
    wide = ops.concat([source, ops.multiply(low, gate)], -1)
    return wide.output(0), np.concatenate(ups, axis=1)


def split(joined: ov.Node | ov.Output, sizes: list[int]) -> list[ov.Output]:
    if len(sizes) == 1:
        return [joined.output(0)]
    parts = ops.variadic_split(joined, ops.constant(np.int64(-1)), ops.constant(np.array(sizes, dtype=np.int64)))
    return [parts.output(index) for index in range(len(sizes))]


def weight_node(weight: np.ndarray, weights: Weights) -> ov.Node:
    """A weight [out, in] as a graph node: unchanged, or symmetric int8, rounded to nearest, with a scale per row."""
    if weights == "native":
        return ops.constant(weight)
    scale = np.maximum(np.abs(weight).max(-1, keepdims=True), 1e-12).astype(np.float32) / 127
    small = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
    return ops.multiply(ops.convert(ops.constant(small), ov.Type.f32), ops.constant(scale))
