"""Writes the ONNX graph of a plain checkpoint and puts integers into it: `PYTHON onnx_graph.py CHECKPOINT INTEGERS OUT`.

Run in an environment with optimum-onnx. INTEGERS is a safetensors file: for every quantized linear `MODULE.q` U8
[N, K / block, block · bits / 8], `MODULE.scale` F32 [N · K / block], `MODULE.zero` U8 [N · ceil(K / block · bits / 8)] where there are zero
points, and metadata `MODULE` -> "bits block K N". Every `MatMul` of such a linear becomes a `MatMulNBits` of onnxruntime.
The last line printed is the versions of the packages, as JSON.
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

_PACKAGES = ("optimum-onnx", "onnx", "onnxruntime", "transformers")


def main() -> None:
    """Export, replace, save."""
    checkpoint, integers, out = map(Path, sys.argv[1:4])
    restate_rope(checkpoint / "config.json")
    from optimum.exporters.onnx import main_export

    main_export(str(checkpoint), str(out), task="text-generation-with-past", do_validation=False, dtype="fp32")
    import onnx

    model = onnx.load(str(out / "model.onnx"))
    for file in out.glob("model.onnx*"):
        file.unlink()
    replace(model.graph, integers)
    if not any(entry.domain == "com.microsoft" for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, str(out / "model.onnx"), save_as_external_data=True, location="model.onnx_data")
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    print(json.dumps(versions))  # noqa: T201 - the answer to the writer


def restate_rope(path: Path) -> None:
    """Write the rotary embedding of a config.json of transformers 5 with the fields of transformers 4, which ignores the others."""
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = dict(config.get("rope_parameters") or {})
    if not rope:
        return
    config.setdefault("rope_theta", rope.pop("rope_theta", 10000.0))
    rope.pop("rope_theta", None)
    if rope.get("rope_type", "default") != "default":
        config.setdefault("rope_scaling", rope)
    path.write_text(json.dumps(config), encoding="utf-8")


def replace(graph: Any, integers: Path) -> None:  # noqa: ANN401 - a GraphProto
    """Put the integers of a file into a graph, in place of the products with their linears.

    Raises:
        ValueError: a linear has no product of its own in the graph, or one of another shape.
    """
    from onnx import helper, numpy_helper
    from safetensors import safe_open

    with safe_open(str(integers), "np") as file:
        layouts = {module: tuple(map(int, text.split())) for module, text in (file.metadata() or {}).items()}
        parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    nodes = {
        node.name.removesuffix("/MatMul").strip("/").replace("/", "."): node
        for node in graph.node
        if node.op_type == "MatMul"
    }
    dense = {initializer.name: initializer for initializer in graph.initializer}
    for module, (bits, block, columns, rows) in layouts.items():
        node = nodes.get(module)
        if node is None or node.input[1] not in dense or list(dense[node.input[1]].dims) != [columns, rows]:
            raise ValueError(f"{module}: no product with a matrix of [{columns}, {rows}] in the graph")
        inputs = [node.input[0]]
        for part in ("q", "scale", "zero"):
            name = f"{module}.{part}"
            if name in parts:
                graph.initializer.append(numpy_helper.from_array(parts[name], name))
                inputs.append(name)
        graph.initializer.remove(dense[node.input[1]])
        attributes = {"K": columns, "N": rows, "bits": bits, "block_size": block, "accuracy_level": 1}
        new = helper.make_node(
            "MatMulNBits", inputs, list(node.output), node.name, domain="com.microsoft", **attributes
        )
        node.CopyFrom(new)


if __name__ == "__main__":
    main()
