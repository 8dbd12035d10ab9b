"""`capture`: check everything, then let replicas take buckets until none is left.

Whatever can be refused is refused before Ray starts or a model is loaded. The store's commit records are the only
state: a run that was interrupted, or killed, is continued by running the same command again.
"""

import shutil
from dataclasses import dataclass, replace
from typing import Any

from actstore.builtin import NAME, model_path
from actstore.capture.cluster import choose_device
from actstore.capture.config import CaptureConfig
from actstore.capture.execute import Outcome, Plan, execute
from actstore.capture.precision import Choice, choose, saved_precision
from actstore.capture.segments import open_segments, segment_prefix, work_of
from actstore.capture.sites import check_sites, expand_sites
from actstore.errors import CaptureError, mismatch
from actstore.progress import Progress
from actstore.store import SiteSpec, StoreSpec, StoreWriter, create_store, open_writer
from actstore.store.format.spec import GROUP_KEY, comparable
from actstore.store.read.index import extents_apart, read_spec
from actstore.store.storage import LocalStorage, open_storage
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
    config = _with_absolute_paths(config)
    recorded = recorded_model(config.out)
    model_config = _load_config(config.model, recorded)
    sites = expand_sites(config.sites, model_config)
    widths = check_sites(model_config, sites, config.model)
    tokens = open_tokens(config.tokens)
    _check_tokens(config, tokens, model_config)
    starts = row_starts(tokens)
    choice = _choose(config, model_config, recorded)
    progress.say(str(choice))
    rows = min(config.rows or int(starts[-1]), int(starts[-1]))
    spec = _store_spec(config, widths, tokens, rows, model_config, choice, recorded)
    if spec.provenance["model"].get("batch_dependent"):
        progress.say("a mixture of experts: the rounding of a row depends on its batch, so keep --batch-size")
    plan = Plan(config=config, model=config.model, choice=choice, batch_size=config.batch_size, store=config.out)
    plan.check_memory(spec, tokens.seq_len, model_config)
    _check_disk(config.out, spec)
    writer = _extended(config, spec) if config.extend else create_store(config.out, spec)
    index = len(extensions(writer.spec)) if config.extend else 0
    copy_tokens(tokens, writer.storage, segment_prefix(index))
    segment = open_segments(writer.storage, writer.spec)[index]
    before = writer.committed()
    buckets = (b for b in range(segment.first_bucket, segment.stop_bucket) if b not in before)
    work = work_of(writer.spec, index, segment, starts, buckets)
    outcome = execute(plan, writer, work, model_config, progress, verb="capture")
    return CaptureSummary(
        store=writer.url,
        rows=writer.spec.planned_rows,
        buckets_before=len(before),
        device=choice.device,
        dtype=choice.dtype,
        **vars(outcome),
    )


def recorded_model(out: str) -> dict[str, Any]:
    """What the store at `out` says about the model that began it; empty if there is no store."""
    storage = open_storage(out)
    found = read_spec(storage).provenance.get("model") if storage.exists(GROUP_KEY) else None
    return found if isinstance(found, dict) else {}


def _choose(config: CaptureConfig, model_config: Any, recorded: dict[str, Any]) -> Choice:
    """Device, precision and attention of the run; what the store at `out` was begun with, if it exists."""
    device = choose_device(config)
    return choose(
        config.dtype,
        saved_precision(config.model, model_config),
        model_config,
        device=device.kind,
        bfloat16_gpu=device.bfloat16,
        recorded=recorded,
    )


def _extended(config: CaptureConfig, wanted: StoreSpec) -> StoreWriter:
    """The store with these tokens planned in addition; everything else must be as it is there."""
    storage = open_storage(config.out)
    found = read_spec(storage)
    about = {"tokens": wanted.provenance["tokens"]}
    if found.provenance.get("tokens") == about["tokens"]:
        raise CaptureError(f"{storage.url} has these tokens already; --extend is for others")
    here, asked = (_without_tokens(spec) for spec in (found, wanted))
    if here != asked:
        remedy = "An extension has the settings of the store it extends."
        raise mismatch(f"the store at {storage.url}", comparable(here), comparable(asked), remedy)
    extend(storage, wanted.rows, about)
    return open_writer(config.out)


def _without_tokens(spec: StoreSpec) -> StoreSpec:
    apart = extents_apart(spec)
    return replace(apart, provenance={k: v for k, v in apart.provenance.items() if k != "tokens"})


def _load_config(model: str, recorded: dict[str, Any]) -> Any:
    """The model's configuration, of the commit that the store was begun with if it is a model of the hub."""
    from actstore.capture.model import load_config, recorded_revision

    return load_config(model, recorded_revision(recorded))


def _with_absolute_paths(config: CaptureConfig) -> CaptureConfig:
    """Workers have another working directory."""
    storage = open_storage(config.out)
    out = str(storage.root.resolve()) if isinstance(storage, LocalStorage) else config.out
    model = model_path(config.model)
    keep = config.model == NAME or not model.exists()
    return replace(config, out=out, model=config.model if keep else str(model.resolve()))


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
    model_config: Any,
    choice: Choice,
    recorded: dict[str, Any],
) -> StoreSpec:
    from actstore.capture.model import model_identity, versions

    identity = model_identity(config.model, model_config, choice.dtype, choice.attention)
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


def _unusual(tokens: TokenTable) -> dict[str, Any]:
    """How the table was made, where that is not as usual; JSON values."""
    usual = {"packing": "joined", "bos": True, "skip_first": 0, "skip_ids": [], "skipped": 0}
    found = {name: getattr(tokens, name) for name in usual} | {"skip_ids": list(tokens.skip_ids)}
    return {name: value for name, value in found.items() if value != usual[name]}


def _check_disk(out: str, spec: StoreSpec) -> None:
    """Refuse to begin what can't fit on a local disk, unless it was begun already."""
    storage = open_storage(out)
    if not isinstance(storage, LocalStorage) or storage.exists(GROUP_KEY):
        return
    there = next(p for p in (storage.root, *storage.root.parents) if p.exists())
    free = shutil.disk_usage(there).free
    needed = spec.rows * sum(s.d * LEAST_BYTES_PER_VALUE[s.kind] for s in spec.sites.values())
    if needed > free:
        raise CaptureError(
            f"{out}: {free / 1e9:.3g} GB are free, but {spec.rows:,} rows of {len(spec.sites)} sites need at least "
            f"{needed / 1e9:.3g} GB; use another --out, fewer sites or --rows"
        )
