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
        parts = {op.get_friendly_name(): matrix(op) for op in layers}
        if changes:
            source, added = with_changes(source, changes, parts)
            parts = {name: np.concatenate([part, added[name]], axis=1) for name, part in parts.items()}
        joined = ops.matmul(source, weight_node(np.concatenate(list(parts.values())), weights), False, True)
        for op, output in zip(layers, split(joined, [len(part) for part in parts.values()]), strict=True):
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
    source: ov.Output, changes: dict[ov.Node, Change], parts: dict[str, np.ndarray]
) -> tuple[ov.Output, dict[str, np.ndarray]]:
    """Add low-rank changes to layers as more columns of their weights: W x + B (g A x) = [W B] [x ; g A x].

    source: the layers' common input x. changes: by the product with A. parts: W [out, in] of each layer by name. Returns
    [x ; g A x] for all changes, and each layer's B [out, ranks], zero in the columns of other layers' changes. This is
    faster than a second product that is added (docs/LOG.md, "the gate as columns of one product").

    Each column of B is divided by a factor, and its row of A multiplied, so that no value of B exceeds the largest of W in
    its row. The int8 scale of a row is then W's own, and rows with a closed gate are those of the base.
    """
    ranks = [len(matrix(op)) for op in changes]
    ups = {name: np.zeros((len(part), sum(ranks)), dtype=np.float32) for name, part in parts.items()}
    downs, column = [], 0
    for (op, change), rank in zip(changes.items(), ranks, strict=True):
        up = matrix(change.up)
        largest = np.abs(parts[change.layer]).max(-1, keepdims=True).clip(1e-12)
        factor = np.abs(up / largest).max(0).clip(1e-12)
        ups[change.layer][:, column : column + rank] = up / factor
        column += rank
        downs.append(matrix(op) * factor[:, None])
        other = next(i for i in (0, 1) if change.add.input_value(i).get_node() != change.up)
        change.add.output(0).replace(change.add.input_value(other))
    low = ops.matmul(source, ops.constant(np.concatenate(downs)), False, True)
    gated = ops.multiply(low, next(iter(changes.values())).gate)
    return ops.concat([source, gated], -1).output(0), ups


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
