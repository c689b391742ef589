"""Greedy tokens of the quantized reference checkpoint, compared with transformers' model of the dequantized weights.

The tokens are checked by one pass of that model over the text that was generated: if the likeliest token after every
prefix is the one that follows, the model would have generated the same text.

Rounded activations are not continuous: where one lies between two integers, the last bit of a float32 sum, which is
another on another processor or over a cache with room to spare, decides which expert a token goes to and which of two
tokens is likelier. So there the model is asked several times, each time with its embeddings disturbed in their last
bit, and any of its answers will do.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from quantlab.checkpoint.index import open_checkpoint
from quantlab.checkpoint.reader import Reader
from quantlab.formats.stored import StoredWeights
from quantlab.recipe.schemes import SCHEMES, SchemeName
from quantlab.runtime.decode import Decoder
from quantlab.runtime.load import load
from tests.checkpoints import INTEGERS
from tests.runtime.foreign import gptq_description, gptq_parts, quantized
from tests.runtime.test_load import with_int8_activations
from tests.runtime.tiny import Artifact, dense_reference, quantize

REFERENCE = Path("eval/reference/deepseek-v3-mini")
STEPS = 64
ROOM = 96


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference checkpoint in bfloat16, one file, without the multi-token-prediction layer."""
    directory = tmp_path_factory.mktemp("reference") / "plain"
    directory.mkdir()
    stored = StoredWeights(Reader(open_checkpoint(REFERENCE)))
    names = [name for name in stored.names() if not name.startswith("model.layers.8.")]
    save_file({name: stored.read(name) for name in names}, directory / "model.safetensors")
    config = json.loads((REFERENCE / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    return directory


def artifact_of(plain: Path, directory: Path, scheme: str) -> Artifact:
    if scheme == "gptq":
        return quantized(plain, directory, gptq_parts(4), gptq_description(4, 128), numbers=lambda name: (4, 128))
    return quantize(plain, directory, SCHEMES[scheme])  # type: ignore[index]


def prompt() -> Tensor:
    """Fixed prompts of token ids in the vocabulary of the reference checkpoint."""
    return torch.randint(300, 8000, (1, 12), generator=torch.Generator().manual_seed(5))


def reference_of(artifact: Artifact, scheme: str) -> PreTrainedModel:
    """transformers' model of the dequantized weights; their files are deleted afterwards."""
    reference = dense_reference(artifact.dense)
    shutil.rmtree(artifact.dense)
    return with_int8_activations(reference) if scheme == "int8" else reference


def likeliest(reference: PreTrainedModel, text: Tensor) -> Tensor:
    """The most likely next token after every prefix that contains the prompt."""
    with torch.no_grad():
        return reference(input_ids=text).logits[0, prompt().shape[1] - 1 : -1].argmax(-1)


def followed(reference: PreTrainedModel, text: Tensor, scheme: str) -> int:
    """Number of new tokens, counted from the first, that equal the reference's most likely token."""
    new = text[0, prompt().shape[1] :]
    same = likeliest(reference, text) == new
    if scheme == "int8":
        assert same.sum() >= STEPS - 4, "few tokens hang on a last bit"
        embeddings = reference.get_input_embeddings().weight.data
        exact = embeddings.clone()
        draws = torch.Generator().manual_seed(0)
        for _ in range(16):
            if same.all():
                break
            embeddings.copy_(exact * (1 + 2**-23 * torch.randn(exact.shape, generator=draws)))
            same |= likeliest(reference, text) == new
        embeddings.copy_(exact)
    return int(same.cumprod(0).sum())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [*INTEGERS, "gptq"])
def test_sixty_four_greedy_tokens_equal_the_reference(scheme: SchemeName, plain: Path, tmp_path: Path) -> None:
    artifact = artifact_of(plain, tmp_path / scheme, scheme)
    model, reference = load(artifact.directory, dtype=torch.float32), reference_of(artifact, scheme)
    static = Decoder(model, batch=1, length=ROOM).generate(prompt(), STEPS)
    assert static.shape == (1, prompt().shape[1] + STEPS)
    assert len(static[0, prompt().shape[1] :].unique()) > 10, "the text varies"
    assert followed(reference, static, scheme) == STEPS
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    dynamic = model.generate(prompt(), past_key_values=DynamicCache(config=model.config), **settings)
    assert followed(reference, dynamic, scheme) == STEPS
    assert scheme == "int8" or torch.equal(dynamic, static)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scheme", [*INTEGERS, "gptq"])
def test_sixty_four_greedy_tokens_on_cuda_equal_the_reference(scheme: SchemeName, plain: Path, tmp_path: Path) -> None:
    """In float32, which is exact on both devices.

    Steps are not captured, because the host reads the routing in float32.
    """
    artifact = artifact_of(plain, tmp_path / scheme, scheme)
    model, reference = load(artifact.directory, dtype=torch.float32, device="cuda"), reference_of(artifact, scheme)
    decoder = Decoder(model, batch=1, length=ROOM)
    assert not decoder.captures
    static = decoder.generate(prompt(), STEPS).cpu()
    assert static.shape == (1, prompt().shape[1] + STEPS)
    assert followed(reference, static, scheme) == STEPS
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    dynamic = model.generate(prompt().cuda(), **settings).cpu()
    assert followed(reference, dynamic, scheme) == STEPS
    assert scheme == "int8" or torch.equal(dynamic, static)


@pytest.mark.slow
def test_generate_with_a_static_cache_of_transformers_and_sampling(plain: Path) -> None:
    model = load(plain, dtype=torch.bfloat16)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12}
    greedy = [
        model.generate(prompt(), do_sample=False, past_key_values=cache, **settings)
        for cache in (StaticCache(config=model.config, max_cache_len=ROOM), None)
    ]
    assert torch.equal(*greedy)
    torch.manual_seed(0)
    sampled = model.generate(prompt(), do_sample=True, num_return_sequences=3, temperature=2.0, **settings)
    assert sampled.shape == (3, prompt().shape[1] + 12)
    assert len(sampled.unique(dim=0)) == 3
    beams = model.generate(prompt(), num_beams=2, do_sample=False, **settings)
    assert beams.shape == (1, prompt().shape[1] + 12)
