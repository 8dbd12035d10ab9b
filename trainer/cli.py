"""`trainer train | eval | export`: the command line, made from the config dataclasses.

Exit codes as in `actstore`: 0, 1 (failed), 2 (bad arguments), 130 (interrupted).
"""

import sys
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes
from tyro.extras import SubcommandApp

from actstore import console
from actstore.progress import Progress
from trainer.config import EvalConfig, ExportConfig, TrainConfig

Json = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help="Also write the figures to this file, as JSON.")]

app = SubcommandApp()


@app.command
def train(config: OmitArgPrefixes[TrainConfig], *, json: Json = None) -> None:
    """Train a JumpReLU SAE on one site of an activation store."""
    from trainer.train import train_from_store

    with Progress() as progress:
        result = train_from_store(config, progress)
    figures = vars(result) | vars(result.final)
    del figures["final"]
    console.print_table(f"SAE {config.out}", figures)
    console.write_json(json, result)


@app.command(name="eval")
def evaluate(config: OmitArgPrefixes[EvalConfig], *, json: Json = None) -> None:
    """Measure on held-out sequences what an SAE costs the model: spliced loss, FVU, L0, densities."""
    from trainer.evaluate import evaluate_saved

    with Progress() as progress:
        result = evaluate_saved(config, progress)
    console.print_table(f"SAE {config.sae}", {name: value for name, value in vars(result).items() if name != "density"})
    console.write_json(json, result)


@app.command
def export(config: OmitArgPrefixes[ExportConfig]) -> None:
    """Write a trained SAE in a format that other tools load: Gemma Scope's npz or SAELens."""
    from trainer.export import export as run

    print(f"wrote {run(config)}")


def main() -> None:
    """Run one command and exit with its code."""
    description = "Train, evaluate and export sparse autoencoders on activation stores."
    sys.exit(console.run(lambda: app.cli(prog="trainer", description=description)))


if __name__ == "__main__":
    main()
