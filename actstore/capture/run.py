"""`capture`: check everything, then let replicas take buckets until none is left.

Whatever can be refused is refused before Ray starts or a model is loaded. The store's commit records are the only
state: a run that was interrupted, or killed, is continued by running the same command again.
"""

import shutil
from dataclasses import dataclass, replace
from typing import Any

from actstore.capture.config import CaptureConfig
from actstore.capture.execute import Outcome, Plan, execute, plan_run
from actstore.capture.segments import open_segments, segment_prefix, work_of
from actstore.capture.sites import check_sites, expand_sites
from actstore.errors import CaptureError, mismatch
from actstore.progress import Progress
from actstore.store import SiteSpec, Storage, StoreSpec, StoreWriter, create_store, open_storage
from actstore.store.format.spec import GROUP_KEY, comparable
from actstore.store.read.index import extents_apart, read_spec
from actstore.store.storage import LocalStorage
from actstore.store.write.extend import extend, extensions
from actstore.tokens import TokenTable, copy_tokens, open_tokens, row_starts

LEAST_BYTES_PER_VALUE = {"bf16": 4 / 3, "f32": 4 / 3, "fixed": 1 / 4}
"""No lossless encoding of bfloat16 activations is smaller: their entropy is about 10.7 bits."""


@dataclass(frozen=True, kw_only=True)
class CaptureSummary(Outcome):
    """What a run did."""

    store: str
    rows: int
    """Rows of the store, now complete."""
    buckets_before: int
    """Committed when this run began."""
    device: str
    dtype: str


def capture(config: CaptureConfig, progress: Progress) -> CaptureSummary:
    """Capture activations into the store at `config.out`, or finish what an earlier run began.

    `ValueError` for sites the model does not have; `CaptureError` if model, tokens and machine do not go together, or a
    worker failed; `TokensError`, `MismatchError` and `StoreError` as their names say. Safe to interrupt at any point.
    """
    from actstore.capture.model import load_config, recorded_revision

    storage = open_storage(config.out)
    recorded = _recorded_model(storage)
    model_config = load_config(config.model, recorded_revision(recorded))
    widths = check_sites(model_config, expand_sites(config.sites, model_config), config.model)
    tokens = open_tokens(config.tokens)
    _check_tokens(config, tokens, model_config)
    starts = row_starts(tokens)
    plan = plan_run(
        config,
        config.model,
        model_config,
        progress,
        store=config.out,
        batch_size=config.batch_size,
        dtype=config.dtype,
        recorded=recorded,
    )
    spec = _store_spec(config, widths, tokens, min(config.rows or int(starts[-1]), int(starts[-1])), plan, recorded)
    if spec.provenance["model"].get("batch_dependent"):
        progress.say("a mixture of experts: the rounding of a row depends on its batch, so keep --batch-size")
    plan.check_memory(spec, tokens.seq_len)
    _check_disk(storage, spec)
    writer = _extended(storage, spec) if config.extend else create_store(config.out, spec)
    index = len(extensions(writer.spec)) if config.extend else 0
    copy_tokens(tokens, writer.storage, segment_prefix(index))
    segment = open_segments(writer.storage, writer.spec)[index]
    before = writer.committed()
    buckets = (b for b in range(segment.first_bucket, segment.stop_bucket) if b not in before)
    work = work_of(writer.spec, index, segment, starts, buckets)
    outcome = execute(plan, writer, work, progress, verb="capture")
    return CaptureSummary(
        store=writer.url,
        rows=writer.spec.planned_rows,
        buckets_before=len(before),
        device=plan.choice.device,
        dtype=plan.choice.dtype,
        **vars(outcome),
    )


def _recorded_model(storage: Storage) -> dict[str, object]:
    """What the store there says about the model that began it; empty if there is no store."""
    found = read_spec(storage).provenance.get("model") if storage.exists(GROUP_KEY) else None
    return found if isinstance(found, dict) else {}


def _extended(storage: Storage, wanted: StoreSpec) -> StoreWriter:
    """The store with these tokens planned in addition; everything else must be as it is there."""
    found = read_spec(storage)
    about = {"tokens": wanted.provenance["tokens"]}
    if found.provenance.get("tokens") == about["tokens"]:
        raise CaptureError(f"{storage.url} has these tokens already; --extend is for others")
    here, asked = (_without_tokens(spec) for spec in (found, wanted))
    if here != asked:
        remedy = "An extension has the settings of the store it extends."
        raise mismatch(f"the store at {storage.url}", comparable(here), comparable(asked), remedy)
    return StoreWriter(storage, extend(storage, wanted.rows, about))


def _without_tokens(spec: StoreSpec) -> StoreSpec:
    apart = extents_apart(spec)
    return replace(apart, provenance={k: v for k, v in apart.provenance.items() if k != "tokens"})


def _check_tokens(config: CaptureConfig, tokens: TokenTable, model_config: Any) -> None:
    """Refuse tokens that the model can't read, or that another tokenizer made."""
    from actstore.capture.model import revision_of, tokenizer_digest

    text = model_config.get_text_config()
    if tokens.max_id >= text.vocab_size:
        raise CaptureError(
            f"tokens {config.tokens} hold id {tokens.max_id}, but {config.model} has {text.vocab_size} ids; "
            f"tokenize with this model's tokenizer (this table's is {tokens.tokenizer})"
        )
    context = getattr(text, "max_position_embeddings", None)
    if context is not None and tokens.seq_len > context:
        raise CaptureError(
            f"tokens {config.tokens} have sequences of {tokens.seq_len}, but {config.model} reads at most {context}; "
            f"tokenize with --seq-len {context} or less"
        )
    digest = tokenizer_digest(config.model, revision_of(model_config)) if config.check_tokenizer else None
    if digest not in (None, tokens.tokenizer_digest):
        raise CaptureError(
            f"tokens {config.tokens} were made with {tokens.tokenizer}, not the vocabulary of {config.model}; "
            "tokenize with this model's tokenizer, or pass --no-check-tokenizer if their ids mean the same"
        )


def _store_spec(
    config: CaptureConfig,
    widths: dict[str, int],
    tokens: TokenTable,
    rows: int,
    plan: Plan,
    recorded: dict[str, object],
) -> StoreSpec:
    from actstore.capture.model import model_identity, versions

    identity = model_identity(config.model, plan.model_config, plan.choice.dtype, plan.choice.attention)
    if "versions" in config.allow:
        identity |= {name: recorded[name] for name in versions() if name in recorded}
    return StoreSpec(
        sites={name: SiteSpec(d=d, encoding=config.encoding) for name, d in widths.items()},
        rows=rows,
        bucket_rows=config.bucket_rows,
        shard_rows=config.shard_rows,
        chunk_rows=config.chunk_rows,
        seed=config.seed,
        codec=config.codec,
        provenance={
            "model": identity,
            "tokens": {
                "fingerprint": tokens.fingerprint,
                "tokenizer": tokens.tokenizer,
                "seq_len": tokens.seq_len,
                "sequences": tokens.sequences,
                **_unusual(tokens),
            },
            "batch_size": config.batch_size,
        },
    )


def _unusual(tokens: TokenTable) -> dict[str, object]:
    """How the table was made, where that is not as usual; JSON values."""
    usual = {"packing": "joined", "bos": True, "skip_first": 0, "skip_ids": [], "skipped": 0}
    found = {name: getattr(tokens, name) for name in usual} | {"skip_ids": list(tokens.skip_ids)}
    return {name: value for name, value in found.items() if value != usual[name]}


def _check_disk(storage: Storage, spec: StoreSpec) -> None:
    """Refuse to begin what can't fit on a local disk, unless it was begun already."""
    if not isinstance(storage, LocalStorage) or storage.exists(GROUP_KEY):
        return
    there = next(p for p in (storage.root, *storage.root.parents) if p.exists())
    free = shutil.disk_usage(there).free
    needed = spec.rows * sum(s.d * LEAST_BYTES_PER_VALUE[s.kind] for s in spec.sites.values())
    if needed > free:
        raise CaptureError(
            f"{storage.url}: {free / 1e9:.3g} GB are free, but {spec.rows:,} rows of {len(spec.sites)} sites need at "
            f"least {needed / 1e9:.3g} GB; use another --out, fewer sites or --rows"
        )
