"""Valid recipes, and the error for each mistake: file, line, path, value found, fix."""

from pathlib import Path

import pytest

from quantlab.errors import RecipeError
from quantlab.recipe.load import load_recipe
from quantlab.recipe.schema import Quantize
from quantlab.recipe.schemes import SCHEMES

GOOD = """\
model: ../model
calibration: {corpus: c.jsonl, samples: 128, length: 512, seed: 0}
variants:
  fp16:           [{cast: float16}]
  int8:           [{quantize: int8}]
  w4a16-experts:  [{quantize: int4_g128, targets: [routed_experts]}]
  pruned-8-w4a16: [{prune: 8e-2}, {quantize: int4_g128, algorithm: {name: rtn, clip: mse}}]
evaluate: {suite: quick.yaml, baseline: source}
"""

MISTAKES = [
    ("int4_g128, targets", "int4_g12, targets", "unknown word", ":6, variants.w4a16-experts[0].quantize", "did you mean `int4_g128`?"),
    ("cast: float16", "cats: float16", "a pass has exactly one verb", ":4, variants.fp16[0]", "write one of {cast"),
    ("cast: float16", "cast: float16, prune: 0.1", "a pass has exactly one verb", ":4, variants.fp16[0]", "write one of {cast"),
    ("samples: 128", "sample: 128", "unknown key", ":2, calibration.sample", "did you mean `samples`?"),
    ("clip: mse", "clp: mse", "unknown key", ":7, variants.pruned-8-w4a16[1].algorithm.clp", "did you mean `clip`?"),
    ("{name: rtn, clip: mse}", "{name: gptq, rounds: 3}", "unknown key", "[1].algorithm.rounds", "use one of: refine, "),
    ("clip: mse", "clip: on", "unknown word", "algorithm.clip", "did you mean `none`?"),
    ("name: rtn", "name: rtm", "unknown word", "algorithm.name", "rtn"),
    ("[routed_experts]", "[routed_expert]", "unknown role `routed_expert`", ":6, variants.w4a16-experts[0].targets", "did you mean `routed_experts`?"),
    ("[routed_experts]", "[router]", "`router` is never quantized or pruned", "targets", "routed_experts, shared_experts"),
    ("[routed_experts]", "[]", "`targets` is empty", "targets", "at least one"),
    ("name: rtn, ", "", "`name` is missing", "[1].algorithm", "{name: …}"),
    ("8e-2", "yes", "not a fraction between 0 and 1", "variants.pruned-8-w4a16[0].prune", "0.08"),
    ("8e-2", "1.5", "not a fraction between 0 and 1", "prune", "2:4"),
    ("8e-2", "1.0", "not a fraction between 0 and 1", "prune", "2:4"),
    ("8e-2", "-0.1", "not a fraction between 0 and 1", "prune", "2:4"),
    ("8e-2", "4:4", "4:4 removes 4 of 4", "prune", "between 1 and m - 1"),
    ("8e-2", "4:2", "4:2 removes 4 of 2", "prune", "between 1 and m - 1"),
    ("8e-2", "0.2, algorithm: {name: reap}, targets: [attention]", "reap removes routed experts", "[0]", "leave them out"),
    ("8e-2", "2:4, algorithm: {name: reap}", "reap removes a fraction of the experts", "[0]", "0.25"),
    ("8e-2", "0.2, algorithm: {name: reap}, ignore: [a]", "reap removes the same number", "[0]", "leave `ignore` out"),
    ("{name: rtn, clip: mse}", "{name: smoothquant}", "smoothquant needs quantized activations", "[1]", "awq"),
    ("{name: rtn, clip: mse}", "{name: gptq, correction: 2}", "a value out of range", "correction", "less than or equal to 1"),
    ("length: 512", "memory: 4 potatoes", "a value out of range", "calibration.memory", "pattern"),
    ("  int8:  ", "  fp16:  ", "a key is repeated", ":5", "keep one of the two"),
    ("length: 512", "length: abc", "wrong type", ":2, calibration.length", "`length` takes a whole number"),
    ("suite:", "suit:", "unknown key", ":8, evaluate.suit", "did you mean `suite`?"),
    ("[{cast: float16}]", "[]", "a variant has no passes", ":4, variants.fp16", "at least one"),
    ("[{cast: float16}]", "{cast: float16}", "a variant is neither a list of passes nor a mapping", ":4, variants.fp16", "write [{cast: float16}]"),
    ("[{cast: float16}]", "float16", "a variant is neither a list of passes nor a mapping", ":4, variants.fp16", "write [{cast: float16}]"),
    ("[{cast: float16}]", "{passes: {cast: float16}}", "wrong type", ":4, variants.fp16.passes", "takes a list"),
    ("[{cast: float16}]", "{passes: [{cast: float61}]}", "unknown word", ":4, variants.fp16.passes[0].cast", "did you mean `float16`?"),
    ("[{cast: float16}]", "{passes: [{cast: float16}], formats: dense}", "unknown key", ":4, variants.fp16.formats", "did you mean `format`?"),
    ("[{cast: float16}]", "{passes: [{cast: float16}], format: [dnse]}", "unknown format `dnse`", ":4, variants.fp16.format", "did you mean `dense`?"),
    ("[{cast: float16}]", "{passes: [{cast: float16}], format: [dense, dense]}", "`dense` is listed twice", ":4, variants.fp16.format", "once"),
    ("[{cast: float16}]", "{format: dense}", "`passes` is missing", ":4, variants.fp16", "add `passes: …`"),
    ("[{quantize: int8}]", "[{quantize: int8}, {prune: 0.1}]", "a variant prunes after quantizing", "variants.int8", "put prune before quantize"),
    ("[{quantize: int8}]", "[{quantize: int8}, {cast: float16}]", "a cast is not the first pass", "variants.int8", "put one cast first"),
    ("  int8:", "  source:", "a variant cannot be called `source`", "variants", "choose another name"),
    ("baseline: source", "baseline: fp61", "the baseline is not a variant", "evaluate.baseline", "did you mean `fp16`?"),
    ("model: ../model\n", "", "`model` is missing", "top level", "add `model: …`"),
    ("model: ..", ": [", "the recipe is not valid YAML", ":1", "correct the syntax"),
    ("  fp16: ", "  FP 16: ", "a value out of range", "variants", "pattern"),
]  # fmt: skip


def _load(tmp_path: Path, text: str) -> RecipeError:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    return caught.value


def test_a_good_recipe(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "good.yaml"
    path.parent.mkdir()
    path.write_text(GOOD)
    (tmp_path / "model").mkdir()
    loaded = load_recipe(path)
    assert list(loaded.recipe.variants) == ["fp16", "int8", "w4a16-experts", "pruned-8-w4a16"]
    assert loaded.recipe.variants["pruned-8-w4a16"].passes[0].prune == 0.08
    assert loaded.model == (tmp_path / "model").resolve()
    assert loaded.hub_id is None
    assert loaded.content == GOOD.encode()


@pytest.mark.parametrize(
    ("old", "new", "what", "where", "fix"), MISTAKES, ids=[f"{case[2][:24]}-{i}" for i, case in enumerate(MISTAKES)]
)
def test_a_mistake_is_explained(tmp_path: Path, old: str, new: str, what: str, where: str, fix: str) -> None:
    assert old in GOOD
    error = _load(tmp_path, GOOD.replace(old, new, 1))
    assert error.what.startswith(what)
    assert where in (error.where or "")
    assert fix in (error.fix or "")
    assert error.found


@pytest.mark.parametrize(
    ("algorithm", "keys"),
    [
        ("rtn", ["clip", "grid", "name"]),
        ("gptq", ["clip", "correction", "damping", "grid", "name", "order", "refine", "shrinkage"]),
        ("awq", ["clip", "grid", "name", "steps"]),
        ("smoothquant", ["alpha", "grid", "name"]),
    ],
)
def test_a_wrong_key_names_the_keys_of_its_algorithm_once(tmp_path: Path, algorithm: str, keys: list[str]) -> None:
    error = _load(tmp_path, GOOD.replace("{name: rtn, clip: mse}", f"{{name: {algorithm}, zzz: 3}}"))
    assert sorted((error.fix or "").removeprefix("use one of: ").split(", ")) == keys


@pytest.mark.parametrize("old", ["[routed_experts]", "../model", "quick.yaml", "clip"])
def test_lone_surrogates_are_refused(tmp_path: Path, old: str) -> None:
    error = _load(tmp_path, GOOD.replace(old, '"\\ud800"', 1))
    assert error.what == "text is not Unicode"
    assert "\\ud800" in (error.found or "")
    assert str(error).encode()


def test_calibration_is_asked_for_where_an_algorithm_needs_it(tmp_path: Path) -> None:
    text = GOOD.replace("calibration: {corpus: c.jsonl, samples: 128, length: 512, seed: 0}\n", "")
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert load_recipe(path).corpus_sha256() == "", "nothing here reads text"
    error = _load(tmp_path, text.replace("clip: mse", "clip: activations"))
    assert error.what.startswith("variant pruned-8-w4a16 needs calibration")
    assert "calibration" in (error.fix or "")


def test_a_missing_corpus(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD.replace("clip: mse", "clip: activations"))
    with pytest.raises(RecipeError, match="calibration text cannot be read"):
        load_recipe(path).corpus_sha256()


def test_a_missing_corpus_that_no_variant_reads(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    assert not load_recipe(path).recipe.calibrated
    with pytest.raises(RecipeError, match="calibration text cannot be read"):
        load_recipe(path).corpus_sha256()
    (tmp_path / "c.jsonl").write_text("")
    assert load_recipe(path).corpus_sha256() == "", "the text is part of no identity"


def test_a_million_tokens_are_no_length_of_a_sample(tmp_path: Path) -> None:
    error = _load(tmp_path, GOOD.replace("length: 512", "length: 1000000"))
    assert error.what == "a value out of range"
    assert "calibration.length" in (error.where or "")


def test_empty_variants(tmp_path: Path) -> None:
    error = _load(tmp_path, "model: x\nvariants: {}\n")
    assert (error.what, error.fix) == ("`variants` is empty", "give at least one entry")


@pytest.mark.parametrize("text", ["", "- a\n", "model\n"])
def test_no_mapping(tmp_path: Path, text: str) -> None:
    assert _load(tmp_path, text).what == "the recipe is not a mapping"


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"model: \xff\n")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")


def test_a_python_object_is_not_made(tmp_path: Path) -> None:
    _load(tmp_path, "model: !!python/object/apply:os.getcwd []\nvariants: {}\n")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("deepseek-ai/DeepSeek-V3@main", ("deepseek-ai/DeepSeek-V3", "main")),
        ("deepseek-ai/DeepSeek-V3", ("deepseek-ai/DeepSeek-V3", None)),
        ("../x/y", None),
    ],
)
def test_hub_ids(tmp_path: Path, model: str, expected: tuple[str, str | None] | None) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {model}\nvariants: {{a: [{{cast: float16}}]}}\n")
    assert load_recipe(path).hub_id == expected


ODD = {
    "control character": "model: a\x01b\n",
    "list as key": "[1, 2]: x\n",
    "alias": "model: &m x\nvariants: *m\n",
    "recursive": "model: &m [*m]\n",
    "deep": "model: " + "[" * 3000 + "]" * 3000 + "\n",
    "huge number": "model: x\nvariants: {a: [{cast: float16}]}\ncalibration: {corpus: c, seed: " + "9" * 5000 + "}\n",
    "forced tag": "model: !!int abc\n",
    "octal looking": "model: x\nvariants: {a: [{cast: float16}]}\ncalibration: {corpus: c, seed: 010}\n",
    "boolean as number": "model: x\nvariants: {a: [{cast: float16}]}\ncalibration: {corpus: c, seed: true}\n",
    "text as number": 'model: x\nvariants: {a: [{cast: float16}]}\ncalibration: {corpus: c, samples: "7"}\n',
    "zero byte": 'model: "a\\0b"\nvariants: {a: [{cast: float16}]}\n',
    "endless name": f"model: {'x' * 300}/{'y' * 9000}\nvariants: {{a: [{{cast: float16}}]}}\n",
    "lone surrogate": 'model: "\\ud800"\nvariants: {a: [{cast: float16}]}\n',
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ODD)
def test_odd_documents_are_refused_with_a_message(case: str, tmp_path: Path) -> None:
    error = _load(tmp_path, ODD[case])
    assert error.what
    assert error.fix


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rtn_searches_the_scales_of_int4_unless_told_otherwise(scheme: str) -> None:
    searched = scheme.startswith("int4")
    for default in (Quantize(quantize=scheme), Quantize(quantize=scheme, algorithm={"name": "rtn"})):
        assert default.clip == default.algorithm.clip == ("mse" if searched else "none")
        assert default == Quantize(quantize=scheme, algorithm={"name": "rtn", "clip": default.clip})
    assert Quantize(quantize=scheme, algorithm={"name": "rtn", "clip": "none"}).clip == "none"
