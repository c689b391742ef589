"""What all peers start from: the checkpoint as BF16 and the calibration tokens. `prepare.py SOURCE OUT`"""

import argparse
from pathlib import Path

import torch
from dense import export_bf16

from quantlab.calibration.corpus import sample_tokens, tokens_sha256

CORPUS = Path(__file__).resolve().parents[3] / "eval/corpora/calibration.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    tokens = sample_tokens(CORPUS, arguments.source, samples=128, length=512, seed=0)
    export_bf16(arguments.source, arguments.out / "bf16")
    torch.save(tokens, arguments.out / "tokens.pt")
    (arguments.out / "tokens.sha256").write_text(tokens_sha256(tokens) + "\n")


if __name__ == "__main__":
    main()
