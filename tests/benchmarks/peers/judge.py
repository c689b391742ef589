"""The judge: every artifact dequantized to dense weights, scored by quantlab's own evaluation on the same held-out text.

    python judge.py SOURCE WORK OUT     # WORK/artifacts/<row> -> OUT.md, OUT.json

All rows are dense float32 checkpoints run by the same code, so what is compared is the weights each artifact stands for.
Documents are drawn once for all rows: ratios and differences between rows are paired. Rows already scored are kept.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from dense import compare, dequantize, write_checkpoint
from measured import THREADS
from table import write_table

from quantlab.evaluation import hardware
from quantlab.evaluation.quality.baseline import Baseline, BaselineWriter
from quantlab.evaluation.quality.measure import document_sums, summarise
from quantlab.evaluation.quality.predictions import score
from quantlab.evaluation.quality.windows import HeldOut, held_out_text
from quantlab.evaluation.suite import load_suite
from quantlab.runtime.load import load

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path, help="the tables, without suffix")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    judge = Judge(arguments.source, arguments.work)
    rows = sorted(path for path in (arguments.work / "artifacts").iterdir() if (path / "config.json").is_file())
    results = {"bf16": judge.row(arguments.work / "bf16")} | {path.name: judge.row(path) for path in rows}
    write_table(results, judge.strata, judge.about(), arguments.out)


class Judge:
    """The held-out text and what the source predicts on it.

    Attributes:
        strata: the domain of each document.
    """

    def __init__(self, source: Path, work: Path) -> None:
        self._source, self._work = source, work / "judge"
        self._work.mkdir(exist_ok=True)
        loaded = load_suite(HERE / "heldout.yaml")
        self._held_out: HeldOut = held_out_text(loaded, source)
        self.strata = self._held_out.strata
        self._suite = f"{loaded.title}, {loaded.sha256[:12]}"
        self._reference, _ = dequantize(work / "bf16")
        self._predictions = self._work / "baseline"
        if not (self._predictions / "complete.json").is_file():
            keep = BaselineWriter(self._predictions, key="source", tokens_sha256=self._held_out.sha256)
            score(load(source, dtype=torch.float32), self._held_out, keep=keep)

    def about(self) -> dict[str, object]:
        """What all rows have in common."""
        return {
            "tokens": self._held_out.tokens,
            "documents": len(np.unique([window.document for window in self._held_out.windows])),
            "suite": self._suite,
            "hardware": hardware.describe(),
            "versions": hardware.versions(),
        }

    def row(self, artifact: Path) -> dict[str, object]:
        """Everything known of one artifact; `sums` are what each document adds to each column."""
        digest = hashlib.sha256()
        for shard in sorted(artifact.glob("*.safetensors")):
            digest.update(shard.read_bytes())
        known = self._work / f"{artifact.name}.json"
        if known.is_file() and json.loads(known.read_text())["sha256"] == digest.hexdigest():
            result = json.loads(known.read_text())
        else:
            result = self._score(artifact) | {"sha256": digest.hexdigest()}
            known.write_text(json.dumps(result))
        beside = artifact.with_name(artifact.name + ".json")
        return result | {"run": json.loads(beside.read_text()) if beside.is_file() else None}

    def _score(self, artifact: Path) -> dict[str, object]:
        weights, quantized = dequantize(artifact)
        found = compare(weights, quantized, self._reference)
        if found["missing"]:
            return {"found": found, "failed": "weights are missing"}
        dense = self._work / "dense"
        write_checkpoint({name: weights[name].float() for name in self._reference}, self._source, dense)
        baseline = Baseline(self._predictions, tokens_sha256=self._held_out.sha256, dtype=torch.float32)
        scores = score(load(dense, dtype=torch.float32), self._held_out, baseline=baseline)
        quality = summarise(self._held_out, scores, baseline.scores, compute_dtype="float32")
        sums = document_sums(self._held_out, scores, baseline.scores)
        print(artifact.name, quality.kl_to_baseline, quality.perplexity_change_percent, flush=True)
        return {"found": found, "quality": quality.model_dump(), "sums": sums.tolist()}


if __name__ == "__main__":
    main()
