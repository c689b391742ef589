"""A model on a GPU that is not the current device. Skipped without two GPUs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantlab.recipe.schemes import SCHEMES
from quantlab.runtime.decode import Decoder
from quantlab.runtime.load import load
from tests.runtime.tiny import quantize, tokens, write_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("artifacts")
    source = write_checkpoint(root / "source", "deepseek_v3")

    def made(scheme: str) -> Path:
        return quantize(source, root / scheme, SCHEMES[scheme]).directory  # type: ignore[index]

    return made


@pytest.mark.parametrize("scheme", ["int4_g128", "int8", "int8_weight"])
def test_a_model_on_the_second_gpu_computes_as_on_the_first(scheme: str, artifact: Callable[[str], Path]) -> None:
    """Prefill and captured steps, with the first GPU as the current device throughout."""
    directory = artifact(scheme)
    found = []
    for device in ("cuda:0", "cuda:1"):
        model = load(directory, dtype=torch.bfloat16, device=device)
        assert {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())} == {device}
        assert torch.cuda.current_device() == 0
        decoder = Decoder(model, batch=2, length=24)
        assert decoder.captures
        logits = [decoder.prefill(tokens(2, 16)[:, :7])]
        logits += [decoder.step(tokens(2, 16)[:, i].to(device)).clone() for i in range(7, 16)]
        assert {str(one.device) for one in logits} == {device}
        found.append(torch.stack(logits).float().cpu())
    assert (found[0] - found[1]).norm() <= 1e-3 * found[0].norm()
