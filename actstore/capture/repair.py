"""`repair`: capture again exactly what `verify --deep` condemns.

Model, precision and batch size are what the store's provenance says, so on the same kind of machine a bucket comes out
bit for bit as it was, and only its damaged objects are put (`actstore.store.maintain.repair`).
"""

from dataclasses import dataclass, replace
from typing import get_args

from actstore.capture.config import Precision, RepairConfig
from actstore.capture.execute import NOTHING, Outcome, Plan, execute, plan_run
from actstore.capture.segments import Work, open_segments, work_of
from actstore.capture.sites import check_sites, parse_sites
from actstore.errors import StoreError
from actstore.progress import Progress
from actstore.store import StoreSpec, StoreWriter
from actstore.store.maintain.repair import commit_version, condemned, restore_derived
from actstore.store.maintain.verify import verify, verify_bucket
from actstore.store.read.index import read_spec
from actstore.store.storage import open_storage
from actstore.tokens import row_starts


@dataclass(frozen=True, kw_only=True)
class RepairSummary(Outcome):
    """What a repair did."""

    store: str
    damaged_objects: int
    made_anew: int
    """Array metadata and manifests, which follow from the rest."""


def repair(url: str, config: RepairConfig, progress: Progress) -> RepairSummary:
    """Repair a damaged store; harmless where nothing is damaged, safe to interrupt and run again.

    `StoreError` if something is damaged that can't be made again, before anything is changed; `CaptureError` and
    `MismatchError` if the model is not there, or another one.
    """
    storage = open_storage(url)
    spec = read_spec(storage)
    step = progress.step("verify", total=1, unit="rows")
    damage = verify(storage, deep=True, begin=step.expect, advance=step.advance).damage
    found = condemned(spec, damage)
    if found.lost:
        raise StoreError(
            f"{storage.url}: {len(found.lost)} damaged objects can't be made again, for example {found.lost[0].key}: "
            f"{found.lost[0].problem}; take them from a copy of the store. Nothing was changed"
        )
    plan = _plan(config, storage.url, spec, progress) if found.buckets else None
    restore_derived(storage, spec, found.derived)
    writer, outcome = StoreWriter(storage, spec, threads=config.threads), NOTHING
    if plan:
        outcome = execute(plan, writer, _work(writer, sorted(found.buckets)), progress, verb="repair")
    writer.finalise(rewritten=frozenset(found.buckets))
    if damage and (left := verify(storage, deep=False).damage):
        raise StoreError(f"{storage.url}: {left[0].key} is still damaged: {left[0].problem}; repair it again")
    return RepairSummary(
        store=storage.url,
        damaged_objects=len(damage),
        made_anew=len(found.derived),
        **vars(outcome),
    )


def _plan(config: RepairConfig, url: str, spec: StoreSpec, progress: Progress) -> Plan:
    """How to run the model that the store was captured with."""
    from actstore.capture.model import load_config, recorded_revision

    about, batch_size = spec.provenance.get("model"), spec.provenance.get("batch_size")
    if not isinstance(about, dict) or not isinstance(batch_size, int) or about.get("dtype") not in get_args(Precision):
        raise StoreError(f"{url}: its provenance names no model, so it was not captured; write the damaged rows again")
    model = config.model or str(about.get("name"))
    model_config = load_config(model, recorded_revision(about))
    check_sites(model_config, parse_sites(spec.sites), model)
    return plan_run(
        config, model, model_config, progress, store=url, batch_size=batch_size, dtype="auto", recorded=about
    )


def _work(writer: StoreWriter, buckets: list[int]) -> list[Work]:
    """What capturing these buckets takes, those that are still damaged.

    The version of a bucket's commit object is read before the bucket is checked once more, and only that version is
    replaced. So of two repairs that found the same damage, one repairs it.
    """
    storage, spec, work = writer.storage, writer.spec, list[Work]()
    for i, segment in enumerate(open_segments(storage, spec)):
        here = [b for b in sorted(buckets) if segment.first_bucket <= b < segment.stop_bucket]
        for w in work_of(spec, i, segment, row_starts(segment.tokens), here) if here else ():
            version = commit_version(storage, w.bucket)
            keys = tuple(d.key for d in verify_bucket(storage, spec, w.bucket))
            if keys:
                work.append(replace(w, keys=keys, version=version))
    return work
