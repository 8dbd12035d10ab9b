"""Train a grid of SAEs: every width, sparsity and seed on every site, each site's SAEs on one stream.

In the directory `out`:

    saes/SITE/NAME/          each SAE as `trainer train` writes it, NAME such as width_16384_target_50_seed_0
    checkpoints/SITE/        of all SAEs of a site together
    release/layer_20/width_16k/average_l0_71/params.npz
                             Gemma Scope's layout with a model card, ready for upload; a folder a kind of site
                             (resid_post) above, if there are several
    sweep.json               which SAE is where, with its figures

Sites are trained one after the other: a resumed sweep reads finished ones back from their last checkpoint. Processes of
a process group each train some of a site's SAEs, and the lead writes the release.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import actstore
from actstore.progress import Progress
from trainer import checkpoint
from trainer.card import Released, folders_of
from trainer.config import SweepConfig
from trainer.device import settle
from trainer.export import write_release
from trainer.files import load_sae, write_json
from trainer.parallel import current
from trainer.stream import Stream, normalisation
from trainer.train import TrainResult, settings_of, train_site

SWEEP, RELEASE = "sweep.json", "release"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One SAE of a sweep."""

    name: str
    site: str
    d_sae: int
    seed: int
    average_l0: float
    """Mean over the steps of the last line of metrics."""
    fvu: float
    """Of the last batch."""
    dead: float
    sae: str
    """Folder of the SAE as `trainer train` writes it, below `out`."""
    release: str | None
    """Folder with params.npz, below `out`; None for TopK, which has no threshold, for transcoders, which have no
    export yet, and where an SAE before it has the same site, width, seed and rounded L0: the layout can't tell those
    apart."""


def sweep(config: SweepConfig, progress: Progress | None = None) -> list[Trained]:
    """Train what `config` asks for, or the rest of it, and return the SAEs in the order of sites and specs.

    Raises, before anything is trained, ValueError for a device that is not there and for a site or batch size that the
    store can't serve, ActstoreError for statistics of no use, and MismatchError for checkpoints of another run; then
    what `train_site` raises.
    """
    display = progress or Progress()
    config = settle(config, [_checkpoints(config, site) for site in config.sites], display)
    results: list[TrainResult] = []
    for stream in check(config):
        folders = {spec.name: config.out / "saes" / stream.site / spec.name for spec in config.specs}
        kept = _checkpoints(config, stream.site)
        where: Any = {"folders": folders, "checkpoints": kept}
        results += train_site(config, stream, config.specs, **where, progress=display, dealt=True)
    ranks = current()
    if ranks.lead:
        done = _release(config, results)
        write_json(config.out / SWEEP, {"saes": [vars(trained) for trained in done]})
    ranks.barrier()
    return [Trained(**trained) for trained in json.loads((config.out / SWEEP).read_text(encoding="utf-8"))["saes"]]


def check(config: SweepConfig) -> list[Stream]:
    """The streams, if all can be trained on; reads only metadata.

    Raises ValueError or ActstoreError if not, MismatchError if the checkpoint of one is of another run.
    """
    store, recipe = actstore.open(config.store), config.specs[0].recipe
    streams: list[Stream] = []
    for site, target in zip(config.sites, config.targets or [None] * len(config.sites), strict=True):
        normalisation(store, site, recipe)
        normalisation(store, target or site, recipe)
        stream = Stream(
            store=store,
            site=site,
            target=target,
            batch_size=recipe.batch_size,
            seed=config.data_seed,
            device=config.device,
        )
        stream.open().close()
        if config.resume:
            checkpoint.latest(_checkpoints(config, site), settings_of(config, stream, config.specs))
        streams.append(stream)
    return streams


def _checkpoints(config: SweepConfig, site: str) -> Path:
    return config.out / "checkpoints" / site


def _release(config: SweepConfig, results: list[TrainResult]) -> list[Trained]:
    """Write the SAEs in Gemma Scope's layout, with the L0 of the last line of metrics, and say where each went."""
    chosen: dict[tuple[Any, ...], int] = {}
    released: list[Released] = []
    keys: list[tuple[Any, ...]] = []
    for i, result in enumerate(results):
        saved, last = load_sae(Path(result.out)), result.final
        keys.append((result.site, result.d_sae, saved.config["seed"], round(last.mean_l0)))
        if saved.sae.recipe.architecture != "topk" and not config.targets and keys[i] not in chosen:
            chosen[keys[i]] = i
            figures = {"l0": last.mean_l0, "fvu": last.fvu, "dead": last.dead}
            released.append(Released(saved=saved, figures=figures))
    shutil.rmtree(config.out / RELEASE, ignore_errors=True)  # another run's L0s have other folders
    if released:
        write_release(released, config.out / RELEASE)
    folders = dict(zip(chosen.values(), folders_of(released), strict=True))
    return [
        Trained(
            name=Path(result.out).name,
            site=result.site,
            d_sae=result.d_sae,
            seed=keys[i][2],
            average_l0=result.final.mean_l0,
            fvu=result.final.fvu,
            dead=result.final.dead,
            sae=str(Path(result.out).relative_to(config.out)),
            release=f"{RELEASE}/{folders[i]}" if i in folders else None,
        )
        for i, result in enumerate(results)
    ]
