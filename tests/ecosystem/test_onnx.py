"""A trained network exported to ONNX: plain convolutions, and the outputs that torch computes."""

import numpy as np
import pytest
import torch
from short_training import network, optimizer_of, task, train

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_export_of_a_trained_network(tmp_path):
    model = network()
    train(model, optimizer_of(model))
    images, labels = task()
    model.eval()
    path = tmp_path / "network.onnx"
    # One image as the example, any number of them afterwards.
    torch.onnx.export(
        model,
        (images[:2],),
        path,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("images")},),
        verbose=False,
    )

    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    operators = [node.op_type for node in graph.graph.node]
    assert operators.count("Conv") == sum(
        isinstance(each, torch.nn.Conv2d) for each in model.modules()
    )
    assert not {"BatchNormalization", "Exp", "ReduceMean", "Sqrt"} & set(operators)
    assert {node.domain for node in graph.graph.node} == {""}

    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (each.name for each in session.get_inputs())
    (outputs,) = session.run(None, {name: images.numpy()})
    with torch.no_grad():
        expected = model(images).numpy()
    # 8 layers of sums of at most 576 products, in another order; logits are of size 10.
    tolerance = 8 * 576 * np.finfo(np.float32).eps
    np.testing.assert_allclose(outputs, expected, rtol=tolerance, atol=10 * tolerance)
    assert (outputs.argmax(axis=1) == labels.numpy()).mean() > 0.9
