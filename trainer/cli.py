"""`trainer train | sweep | eval | export`: the command line, made from the config dataclasses.

`train` and `sweep` also run as several processes: `torchrun --nproc-per-node 4 -m trainer.cli train ...`
(`trainer/parallel.py`). Exit codes as in `actstore`: 0, 1 (failed), 2 (bad arguments), 130 (interrupted).
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from tyro.conf import OmitArgPrefixes
from tyro.extras import SubcommandApp

from actstore import console
from actstore.progress import Progress
from trainer.config import EvalConfig, ExportConfig, SweepConfig, TrainConfig

Json = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help="Also write the figures to this file, as JSON.")]

app = SubcommandApp()


@app.command
def train(config: OmitArgPrefixes[TrainConfig], *, json: Json = None) -> None:
    """Train an SAE on one site of an activation store."""
    from trainer.device import choose_device
    from trainer.parallel import joined
    from trainer.train import train_from_store

    with joined(choose_device(config.device)[0]) as ranks, _progress(quiet=not ranks.lead) as progress:
        result = train_from_store(config, progress)
    if ranks.lead:
        figures = vars(result) | vars(result.final)
        del figures["final"]
        console.print_table(f"SAE {config.out}", figures)
        console.write_json(json, result)


@app.command
def sweep(config: OmitArgPrefixes[SweepConfig], *, json: Json = None) -> None:
    """Train SAEs of every width, sparsity and seed on every site; one read of the store feeds all SAEs of a site."""
    from trainer.device import choose_device
    from trainer.parallel import joined
    from trainer.sweep import sweep as run

    with joined(choose_device(config.device)[0]) as ranks, _progress(quiet=not ranks.lead) as progress:
        trained = run(config, progress)
    if ranks.lead:
        lines: list[tuple[object, ...]] = [(t.release, t.name, t.average_l0, t.fvu, t.dead) for t in trained]
        console.print_table(f"sweep {config.out}", lines, header=("release", "SAE", "L0", "FVU", "dead"))
        console.write_json(json, {"saes": [vars(t) for t in trained]})


def _progress(*, quiet: bool) -> Progress:
    """The display; of several processes the lead's alone is seen."""
    return Progress(Console(quiet=True, force_terminal=False)) if quiet else Progress()


@app.command(name="eval")
def evaluate(config: OmitArgPrefixes[EvalConfig], *, json: Json = None) -> None:
    """Measure on held-out sequences what an SAE costs a model: spliced loss, FVU, L0, densities, by position."""
    from trainer.evaluate import evaluate_saved

    with Progress() as progress:
        found = evaluate_saved(config, progress)
    if len({one.sae for one in found}) > 1:
        columns = ("sae", "model", "data", "l0", "fvu", "delta_loss", "loss_recovered", "dead")
        lines = [tuple(one.figures[name] for name in columns) for one in found]
        console.print_table(f"SAEs in {config.sae}", lines, header=columns)
    else:
        for one in found:
            console.print_table(f"SAE {one.sae}", {k: v for k, v in one.figures.items() if k != "sae"})
    console.write_json(json, {"evaluations": [asdict(one) for one in found]})


@app.command
def export(config: OmitArgPrefixes[ExportConfig]) -> None:
    """Write trained SAEs in a format that other tools load: Gemma Scope's, SAELens' or dictionary_learning's."""
    from trainer.export import export as run

    print(f"wrote {run(config)}")


def main() -> None:
    """Run one command and exit with its code."""
    description = "Train, evaluate and export sparse autoencoders on activation stores."
    sys.exit(console.run(lambda: app.cli(prog="trainer", description=description)))


if __name__ == "__main__":
    main()
