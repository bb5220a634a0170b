"""Train two adapters on toy questions, switch between them, save, merge, and compare.

A small OPT model, built from a configuration, first learns to answer questions. Then one
adapter learns to say every answer twice and another to say it backwards. Both are saved as PEFT
adapters, one is merged into the base with the command line, and the merged model's logits are
compared with the live ones.

    python examples/questions_and_answers.py            # a quarter of a minute
    python examples/questions_and_answers.py --steps 5  # a quick look

Needs transformers and, for the loss plot, matplotlib (the extras ``test`` and ``plot``).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from loratool.live import attach

FACTS = {
    "capital of france": "paris",
    "capital of japan": "tokyo",
    "colour of the sky": "blue",
    "colour of grass": "green",
    "legs of a spider": "eight",
    "days in a week": "seven",
    "largest planet": "jupiter",
    "opposite of hot": "cold",
}
MANNERS = {"twice": lambda reply: f"{reply} {reply}", "backwards": lambda reply: reply[::-1]}
PAD = 256
"""Bytes are the tokens; one more fills up short lines."""


def main() -> int:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150, help="of each training; default 150")
    parser.add_argument("--output", type=Path, help="a folder; default: a temporary one")
    arguments = parser.parse_args()
    output = arguments.output or Path(tempfile.mkdtemp(prefix="loratool-example-"))
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = build_model()
    losses = {"base": train(model, model.parameters(), encode(str), arguments.steps, "base", 3e-3)}
    model.save_pretrained(output / "base")

    for name, manner in MANNERS.items():
        live = attach(model, name=name, targets="all-linear", rank=16, alpha=32)
        parameters = live.parameters(name)
        losses[name] = train(model, parameters, encode(manner), arguments.steps, name, 5e-3)
        live.save(output / name, name)
    trainable, total = live.count()
    print(f"{trainable:,} of {total:,} parameters are trained at a time")

    model.eval()
    probe = encode(str)[0][:2]
    with torch.no_grad():
        for question in list(FACTS)[:2]:
            live.deactivate()
            print(f"{'base':>9}: {question}? {answer(model, question)}")
            for name in live.names:
                with live.using(name):
                    print(f"{name:>9}: {question}? {answer(model, question)}")
        live.activate("twice")
        wanted = model(probe).logits

    merged = output / "merged"
    command = [sys.executable, "-m", "loratool", "merge", output / "base", output / "twice"]
    subprocess.run([*map(str, command), "-o", str(merged), "--force"], check=True)
    with torch.no_grad():
        found = OPTForCausalLM.from_pretrained(merged).eval()(probe).logits
    difference = float((found - wanted).abs().max())
    print(f"largest difference of logits, merged and live: {difference:.2g}")
    plot(losses, output / "loss.png")
    print(f"everything is in {output}")
    return 0 if difference < 1e-4 else 1


def build_model() -> OPTForCausalLM:
    """Return a small model with random weights, a byte to a token."""
    config = OPTConfig(
        vocab_size=PAD + 1,
        hidden_size=96,
        word_embed_proj_dim=96,
        ffn_dim=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        dropout=0.0,
        pad_token_id=PAD,
    )
    return OPTForCausalLM(config)


def encode(manner: Callable[[str], str]) -> tuple[Tensor, Tensor]:
    """Return token ids and labels of all facts, answered in some manner; only answers count."""
    lines, labels = [], []
    for question, reply in FACTS.items():
        prompt = f"{question}? ".encode()
        target = manner(reply).encode() + b"\n"
        lines.append([*prompt, *target])
        labels.append([*[-100] * len(prompt), *target])
    length = max(len(line) for line in lines)
    padded = [line + [PAD] * (length - len(line)) for line in lines]
    masked = [label + [-100] * (length - len(label)) for label in labels]
    return torch.tensor(padded), torch.tensor(masked)


def train(
    model: OPTForCausalLM,
    parameters: Iterable[nn.Parameter],
    batch: tuple[Tensor, Tensor],
    steps: int,
    name: str,
    rate: float,
) -> list[float]:
    """Train some parameters and return the losses."""
    model.train()
    ids, labels = batch
    optimiser = torch.optim.AdamW(parameters, lr=rate)
    losses = []
    for _ in track(range(steps), description=f"training {name:<9}"):
        loss = model(ids, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    print(f"{name}: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    return losses


def answer(model: OPTForCausalLM, question: str) -> str:
    """Return what the model says, the likeliest byte at each step."""
    ids = torch.tensor([list(f"{question}? ".encode())])
    start = ids.shape[1]
    for _ in range(10):
        token = model(ids).logits[:, -1].argmax(dim=-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        if token.item() in (PAD, ord("\n")):
            break
    said = bytes(min(255, token) for token in ids[0, start:].tolist())
    return said.decode(errors="replace").strip()


def plot(losses: dict[str, list[float]], path: Path) -> None:
    """Draw the losses, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no loss plot: matplotlib is not installed")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in losses.items():
        axes.plot(range(1, len(values) + 1), values, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss of the answer")
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
