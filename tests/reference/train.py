"""Train the reference model on one GPU for a fixed time and write it as a DeepSeek-V3 checkpoint.

    python tests/reference/train.py --tokens DIRECTORY --out DIRECTORY --minutes 8.5

`--tokens` is the output of `tokenise.py`. The learning rate follows the fraction of the time that has passed: warm-up,
plateau, linear decay to zero. Matrices are trained by Muon; embedding, head, router and norms by AdamW. Experts are
balanced without an auxiliary loss: after every step the routing bias of each expert moves by a fixed amount against
its load (arXiv 2412.19437, section 2.1.2).
"""

import argparse
import csv
import json
import lzma
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from export import export, rounded_state
from model import Model, ModelConfig, Router
from muon import Muon
from scoring import score, summarise
from torch import Tensor

VALIDATION_TOKENS = 300_000
"""Tail of the shuffled training stream used for validation, so that the held-out text never is."""


@dataclass(frozen=True)
class Settings:
    """Settings of a run, recorded with its results."""

    minutes: float
    """Wall-clock time of training, compilation excluded."""
    sequence: int
    """Tokens in a window."""
    batch: int
    """Windows in a step."""
    muon_lr: float
    adam_lr: float
    weight_decay: float
    """Decoupled decay of the matrices, multiplied by the learning rate."""
    balance: float
    """Step of the routing bias while the learning rate is at its peak."""
    warmup: float
    """Fraction of the time."""
    decay_from: float
    """Fraction of the time after which the learning rate falls linearly to zero."""
    seed: int


class Stream:
    """Random windows of the training tokens: each epoch visits every window once, at a fresh offset."""

    def __init__(self, tokens: Tensor, settings: Settings) -> None:
        self.tokens, self.length, self.batch = tokens, settings.sequence, settings.batch
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.starts = torch.empty(0, dtype=torch.long)
        self.span = torch.arange(self.length + 2, device=tokens.device)

    def next(self) -> Tensor:
        """Windows [batch, sequence + 2]."""
        if len(self.starts) < self.batch:
            offset = int(torch.randint(self.length, (1,), generator=self.generator))
            count = (len(self.tokens) - self.length - 2 - offset) // self.length
            order = torch.randperm(count, generator=self.generator)
            self.starts = order * self.length + offset
        taken, self.starts = self.starts[: self.batch], self.starts[self.batch :]
        return self.tokens[taken.to(self.tokens.device)[:, None] + self.span].long()


def schedule(progress: float, settings: Settings) -> float:
    """Factor of the learning rates at a fraction of the time."""
    if progress < settings.warmup:
        return max(progress / settings.warmup, 0.02)
    return min(1.0, max(0.0, (1.0 - progress) / (1.0 - settings.decay_from)))


def optimisers(model: Model, settings: Settings) -> tuple[Muon, torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest."""
    matrices: list[tuple[Tensor, int]] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if "model.layers" in name and parameter.ndim >= 2 and "mlp.gate.weight" not in name:
            matrices.append((parameter, 2 if name.endswith("gate_up_proj") else 1))
        else:
            others.append(parameter)
    muon = Muon(matrices, momentum=0.95, weight_decay=settings.weight_decay)
    adam = torch.optim.AdamW(others, lr=settings.adam_lr, betas=(0.9, 0.97), weight_decay=0.0)
    return muon, adam


@torch.no_grad()
def balance(routers: list[Router], loads: Tensor, amount: float) -> None:
    """Raise the bias of experts below the mean load, lower it above."""
    for router, load in zip(routers, loads.float(), strict=True):
        router.e_score_correction_bias += amount * torch.sign(load.mean() - load)


@torch.no_grad()
def validation_loss(model: Model, tokens: Tensor, length: int) -> float:
    """Mean loss in nats on consecutive windows."""
    count = (len(tokens) - 1) // length
    rows = tokens[: count * length + 1].long().unfold(0, length + 1, length)
    losses = [
        model.token_losses(model.trunk(part[:, :-1])[0], part[:, 1:]).mean() * len(part) for part in rows.split(32)
    ]
    return float(sum(losses)) / count


def train(model: Model, tokens: Tensor, settings: Settings, log: Path, *, compiled: bool) -> dict[str, Any]:
    """Train until the time is up; returns counts and the log's last losses."""
    fit, held = tokens[:-VALIDATION_TOKENS], tokens[-VALIDATION_TOKENS:]
    stream, (muon, adam) = Stream(fit, settings), optimisers(model, settings)
    routers = [module for module in model.modules() if isinstance(module, Router)]
    step_function = torch.compile(model, dynamic=False) if compiled else model
    for _ in range(3):
        sum(step_function(stream.next())[:2]).backward()  # compiles before the clock starts
    model.zero_grad(set_to_none=True)
    rows: list[list[float]] = []
    start, step, progress, loss = time.monotonic(), 0, 0.0, 0.0
    while progress < 1.0:
        factor = schedule(progress, settings)
        main, second, loads = step_function(stream.next())
        (main + (0.3 if progress < 0.6 else 0.1) * second).backward()
        muon.step(settings.muon_lr * factor)
        for group in adam.param_groups:
            group["lr"] = settings.adam_lr * factor
        adam.step()
        adam.zero_grad(set_to_none=True)
        balance(routers, loads, settings.balance * min(1.0, 2 * factor))
        step += 1
        if step % 10 == 0:
            loss = main.item()
            progress = (time.monotonic() - start) / (60 * settings.minutes)
            if not math.isfinite(loss):
                raise SystemExit(f"loss is {loss} at step {step}: lower --muon-lr or --adam-lr")
        if step % 100 == 0:
            rows.append([step, step * settings.batch * settings.sequence, round(progress * 60 * settings.minutes, 1),
                         round(factor, 4), round(loss, 4), round(second.item(), 4),
                         round((loads.float().amax(1) / loads.float().mean(1)).max().item(), 3),
                         round((loads.float().amin(1) / loads.float().mean(1)).min().item(), 3)])  # fmt: skip
            if step % 500 == 0:
                print(rows[-1], "validation", round(validation_loss(model, held, settings.sequence), 4), flush=True)
                write_log(log, rows)
    seconds = time.monotonic() - start
    write_log(log, rows)
    return {
        "steps": step, "tokens": step * settings.batch * settings.sequence, "seconds": round(seconds, 1),
        "epochs": round(step * settings.batch * settings.sequence / len(fit), 2),
        "tokens_per_second": round(step * settings.batch * settings.sequence / seconds),
        "train_loss": round(loss, 4), "validation_loss": round(validation_loss(model, held, settings.sequence), 4),
    }  # fmt: skip


def write_log(path: Path, rows: list[list[float]]) -> None:
    """The training log as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "tokens", "seconds", "lr_factor", "loss", "mtp_loss", "load_max", "load_min"])
        writer.writerows(rows)


@torch.no_grad()
def evaluate(model: Model, documents: list[dict[str, Any]], device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Held-out scores and the experts' shares of a uniform load, layer by layer."""
    total = torch.zeros(1)

    def losses(tokens: Tensor) -> Tensor:
        nonlocal total
        hidden, loads = model.trunk(tokens[:, :-1])
        total = total + loads.cpu()
        return model.token_losses(hidden, tokens[:, 1:]).view(len(tokens), -1)

    scores = summarise(documents, score(documents, losses, device=device))
    shares = total / total.mean(1, keepdim=True)
    load = {
        str(i + 1): {"min": round(s.min().item(), 3), "max": round(s.max().item(), 3)} for i, s in enumerate(shares)
    }
    return scores, load


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help="folder written by tokenise.py")
    parser.add_argument("--out", type=Path, required=True, help="output folder: checkpoint/, log.csv, results.json")
    parser.add_argument("--minutes", type=float, default=8.5, help="training time (default 8.5)")
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64, help="windows per step (default 64)")
    parser.add_argument("--muon-lr", type=float, default=3e-3)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.2)
    parser.add_argument("--balance", type=float, default=1e-3)
    parser.add_argument("--warmup", type=float, default=0.01)
    parser.add_argument("--decay-from", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="run eagerly")
    parser.add_argument(
        "--limit", type=int, help="use only this many training tokens and 4 held-out documents (to try it)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Train, score before and after FP8 rounding, export."""
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(**{name: getattr(arguments, name) for name in Settings.__dataclass_fields__})
    torch.manual_seed(settings.seed)
    ids = np.frombuffer(lzma.decompress((arguments.tokens / "train.bin.xz").read_bytes()), dtype=np.uint16)
    documents = json.loads((arguments.tokens / "heldout.json").read_text())
    if arguments.limit:
        ids, documents = ids[: arguments.limit + VALIDATION_TOKENS], documents[:4]
    tokens = torch.from_numpy(ids.astype(np.int32)).to(arguments.device)
    config = ModelConfig()
    model = Model(config).to(arguments.device)
    results: dict[str, Any] = {
        "settings": vars(settings), "parameters": sum(p.numel() for p in model.parameters()),
        "hardware": torch.cuda.get_device_name() if tokens.is_cuda else platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }  # fmt: skip
    compiled = not arguments.no_compile
    results["training"] = train(model, tokens, settings, arguments.out / "log.csv", compiled=compiled)
    print(results["training"], flush=True)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    export(state, config, arguments.out / "checkpoint")
    for label, fp8 in (("bf16", False), ("fp8", True)):
        model.load_state_dict(rounded_state(state, fp8=fp8))
        results[f"heldout_{label}"], results[f"expert_load_{label}"] = evaluate(model, documents, arguments.device)
        print(label, json.dumps(results[f"heldout_{label}"]), json.dumps(results[f"expert_load_{label}"]), flush=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
