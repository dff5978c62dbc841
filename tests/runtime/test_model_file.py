"""Changes to .onnx bytes, against the onnx package."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qwen_runtime.backends.model_file import Entries, with_attribute, with_external_data

LEVEL = "accuracy_level"


def external(name: str, **entries: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.UINT8, dims=[4, 300])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.fixture
def model() -> onnx.ModelProto:
    """Two weights in a file and one in the graph; three products, one without the attribute."""
    nodes = [
        helper.make_node(
            "MatMulNBits",
            ["x", "w"],
            ["y"],
            name="/a",
            domain="com.microsoft",
            K=300,
            **{LEVEL: 4},
        ),
        helper.make_node(
            "MatMulNBits", ["y", "v"], ["z"], name="/b", domain="com.microsoft", **{LEVEL: 300}
        ),
        helper.make_node("MatMulNBits", ["z", "v"], ["t"], name="/c", domain="com.microsoft"),
        # The name is a value here, not an attribute.
        helper.make_node("Add", ["t", LEVEL], ["out"], name="MatMulNBits", **{LEVEL: 4}),
    ]
    floats = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 300])
        for name in ("x", "out")
    ]
    initializers = [
        external("w", location="weights.bin", offset="0", length="1200"),
        numpy_helper.from_array(np.arange(3, dtype=np.float32), LEVEL),
        external("v", location="weights.bin", offset="4096", length="1200", checksum="é"),
    ]
    graph = helper.make_graph(nodes, "g", floats[:1], floats[1:], initializers)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, producer_name="of tests")


def test_places_of_weights_change_and_nothing_else_does(model: onnx.ModelProto) -> None:
    asked: dict[str, Entries] = {}

    def place(name: str, entries: Entries) -> Entries:
        asked[name] = entries
        return {"location": "fused.bin", "offset": str(1 << 40 | len(asked)), "length": "7"}

    changed = onnx.load_from_string(with_external_data(model.SerializeToString(), place))

    assert asked == {
        "w": {"location": "weights.bin", "offset": "0", "length": "1200"},
        "v": {"location": "weights.bin", "offset": "4096", "length": "1200", "checksum": "é"},
    }
    for number, tensor in enumerate((model.graph.initializer[0], model.graph.initializer[2]), 1):
        del tensor.external_data[:]
        for key, value in (("location", "fused.bin"), ("offset", str(1 << 40 | number))):
            tensor.external_data.add(key=key, value=value)
        tensor.external_data.add(key="length", value="7")
    assert changed == model


def test_a_model_whose_places_stay_is_the_same_model(model: onnx.ModelProto) -> None:
    encoded = model.SerializeToString()
    assert onnx.load_from_string(with_external_data(encoded, lambda _, old: old)) == model


@pytest.mark.parametrize("value", [0, 4, 127, 128, 70_000])
def test_only_nodes_of_the_type_that_have_the_attribute_change(
    model: onnx.ModelProto, value: int
) -> None:
    changed = with_attribute(model.SerializeToString(), "MatMulNBits", LEVEL, value)
    for node in model.graph.node[:2]:
        (attribute,) = (each for each in node.attribute if each.name == LEVEL)
        attribute.i = value
    assert onnx.load_from_string(changed) == model


def test_a_type_that_no_node_has_changes_nothing(model: onnx.ModelProto) -> None:
    encoded = model.SerializeToString()
    assert onnx.load_from_string(with_attribute(encoded, "MatMul", LEVEL, 1)) == model


def test_an_entry_without_a_value_is_an_error(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].external_data.add(key="lonely").ClearField("value")
    with pytest.raises(KeyError, match="2"):
        with_external_data(model.SerializeToString(), lambda _, old: old)


@pytest.mark.parametrize("cut", [1, 40, 200])
def test_bytes_that_end_early_are_an_error(model: onnx.ModelProto, cut: int) -> None:
    encoded = model.SerializeToString()[:-cut]
    for change in (
        lambda: with_external_data(encoded, lambda _, old: old),
        lambda: with_attribute(encoded, "MatMulNBits", LEVEL, 0),
    ):
        with pytest.raises((IndexError, ValueError), match=r".+"):
            change()
