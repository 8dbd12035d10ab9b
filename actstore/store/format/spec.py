"""What a store is: its fixed numbers, the names of its objects, and its zarr metadata.

`StoreSpec` is the content of the group's `actstore` attribute, format version 1 (`docs/format.md`). Everything else
follows from it: how many buckets and shards there are, which rows each holds, and where each object lies. It is read
from untrusted bytes, so every field is checked before it is used.
"""

import json
import operator
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from actstore import keyed
from actstore.errors import StoreError, brief
from actstore.store.format import codec as codecs
from actstore.store.format.bfloat16 import NATIVE as BFLOAT16
from actstore.store.format.sealed import MAX_VALUES, METADATA_LIMIT, SEAL, UNSEALED, Sealed, decode, dump, parse

FORMAT_VERSION = 1
ATTRIBUTE = "actstore"
GROUP_KEY = "zarr.json"
PROVENANCE_ARRAYS = ("sequence", "position", "token_id")
"""Row-aligned int32 arrays beside the sites."""
EVENTS = "events"
"""Below it lie the logs of the runs that wrote the store; no reader needs them."""

Kind = Literal["bf16", "f32", "fixed"]
DTYPES: dict[Kind, np.dtype[Any]] = {"bf16": BFLOAT16, "f32": np.dtype("<f4"), "fixed": np.dtype("<i2")}
"""How each encoding is stored."""
BITS, FLOATS = np.dtype("<u2"), np.dtype("<f4")
RAW_DTYPES: dict[Kind, tuple[np.dtype[Any], ...]] = {"bf16": (BITS,), "f32": (FLOATS,), "fixed": (BITS, FLOATS)}
"""What the writer takes for each encoding: bf16 travels as its bits, `fixed` is made from either."""


def held_as(kind: Kind, *, bfloat16: bool) -> np.dtype[Any]:
    """What rows of an encoding are held as until they are encoded: bfloat16 bits if that loses nothing, else float32.

    `bfloat16` says whether the values come as bfloat16; others, float16 too, are widened unless bf16 is stored.
    """
    return BITS if kind == "bf16" or (kind == "fixed" and bfloat16) else FLOATS


_SITE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[0-9]+)?")
_RESERVED = (*PROVENANCE_ARRAYS, "c", "tokens", "commits", "manifest", "calibration", "zarr", EVENTS, SEAL)
MAX_D = 1 << 20
MAX_BUCKET_ROWS = 1 << 31
MAX_ROWS = 1 << 56
OPEN_ENDED = 1 << 40
"""Planned rows of a store whose number of rows is not known yet (`StoreWriter.fix_rows` sets it)."""
MAX_CHUNK_BYTES = 1 << 28
"""Of a decoded chunk: what a reader may have to allocate for one."""
MAX_CHUNKS = 1 << 16
"""Of a bucket, hence of a shard: what bounds every index."""
MAX_BUCKETS = 1 << 24
"""Of a store: bounds what a reader holds of each, before it has read anything that has their size."""
MAX_INDEX = 1 << 28
"""Chunks of one array: bounds what a reader of it holds, 8 bytes for each."""
MAX_EXTENSIONS = 1 << 10
"""Of a store: what bounds the list of its short buckets."""
MAX_SITES = 1 << 12
MAX_WIDTH = 1 << 21
"""Of all sites together: what bounds the statistics of a commit record."""
MAX_DEPTH = 64
"""Of lists and objects in provenance: bounds recursion."""
MAX_NAME = 128
"""Characters of a site's name, which file systems must be able to hold."""


def parse_encoding(text: object) -> tuple[Kind, float]:
    """Kind and eps (0 for lossless kinds) of `bf16`, `f32` or `fixed:<eps>`; `ValueError` for anything else."""
    if text in ("bf16", "f32"):
        return ("bf16" if text == "bf16" else "f32"), 0.0
    if isinstance(text, str) and text.startswith("fixed:"):
        try:
            eps = float(text.removeprefix("fixed:"))
        except ValueError:
            eps = 0.0
        if 1e-8 <= eps <= 0.5:
            return "fixed", eps
    raise ValueError(f"encoding is {text!r}, expected bf16, f32 or fixed:EPS with EPS from 1e-8 to 0.5 (fixed:1e-3)")


@dataclass(frozen=True, kw_only=True)
class SiteSpec:
    """One site's array."""

    d: int
    """Width of the activation vectors."""
    encoding: str = "bf16"
    """`bf16`, `f32` or `fixed:<eps>`: how values are stored; see `docs/format.md`."""

    def __post_init__(self) -> None:
        """Spell eps in one way, so that equal settings are equal text."""
        object.__setattr__(self, "d", _whole("d", self.d))
        kind, eps = parse_encoding(self.encoding)
        object.__setattr__(self, "encoding", f"fixed:{eps!r}" if kind == "fixed" else kind)

    @property
    def kind(self) -> Kind:
        """The encoding without its parameter."""
        return parse_encoding(self.encoding)[0]

    @property
    def eps(self) -> float:
        """Added FVU of `fixed`; 0 for lossless encodings."""
        return parse_encoding(self.encoding)[1]


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """The fixed numbers of a store."""

    sites: dict[str, SiteSpec]
    """Arrays by site name."""
    rows: int
    """Length of the arrays: planned rows, and the gaps behind short buckets."""
    bucket_rows: int = 1 << 20
    """Rows of a bucket: shuffle scope and unit of commit."""
    shard_rows: int = 1 << 14
    """Rows of a shard: one object on storage. Divides bucket_rows."""
    chunk_rows: int = 1 << 11
    """Rows of a chunk: the read unit. Divides shard_rows."""
    seed: int = 0
    """Key of the row order inside buckets."""
    codec: codecs.CodecName = "planes"
    """Chunk codec; see `actstore.store.format.codec`."""
    provenance: dict[str, Any] = field(default_factory=dict[str, Any])
    """Where the rows come from: model, tokens, versions; JSON values only."""
    short_buckets: tuple[tuple[int, int], ...] = ()
    """Bucket and its rows, ascending: where the store ended when it was extended. The last bucket needs no entry."""

    def __post_init__(self) -> None:
        """Check every number (`ValueError` names the field) and sort the sites, whose order says nothing."""
        object.__setattr__(self, "rows", _whole("rows", self.rows, 1, MAX_ROWS))
        object.__setattr__(self, "seed", _whole("seed", self.seed))
        for name in ("bucket_rows", "shard_rows", "chunk_rows"):
            object.__setattr__(self, name, _whole(name, getattr(self, name), 1, MAX_BUCKET_ROWS))
        if self.codec not in codecs.CODECS:
            raise ValueError(f"codec is {self.codec!r}, expected one of {', '.join(codecs.CODECS)}")
        _check_numbers(self)
        _check_sites(self)
        object.__setattr__(self, "sites", dict(sorted(self.sites.items())))
        object.__setattr__(self, "provenance", _as_stored(self.provenance))

    @property
    def buckets(self) -> int:
        """Number of buckets."""
        return -(-self.rows // self.bucket_rows)

    def bucket_range(self, bucket: int) -> tuple[int, int]:
        """First row and the row after the last of a bucket."""
        if not 0 <= bucket < self.buckets:
            raise ValueError(f"bucket {bucket} does not exist: the store has {self.buckets}")
        first = bucket * self.bucket_rows
        return first, first + int(self.bucket_sizes(np.array([bucket]))[0])

    def bucket_sizes(self, buckets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of each of these buckets; all of them exist."""
        sizes = np.minimum(self.bucket_rows, self.rows - buckets * self.bucket_rows)
        for bucket, rows in self.short_buckets:
            sizes[buckets == bucket] = rows
        return sizes

    def chunk_counts(self, buckets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Chunks of an array in each of these buckets."""
        return -(-self.bucket_sizes(buckets) // self.chunk_rows)

    @property
    def fixed_sites(self) -> set[str]:
        """Names of the sites that have a calibration."""
        return {name for name, site in self.sites.items() if site.kind == "fixed"}

    @property
    def planned_rows(self) -> int:
        """Rows of the finished store: what is planned without the gaps behind short buckets."""
        return self.rows - sum(self.bucket_rows - rows for _, rows in self.short_buckets)

    def permutation(self, bucket: int, rows: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Stored place, within the bucket, of each of its rows [rows of the bucket], or of `rows`, counted from 0."""
        first, stop = self.bucket_range(bucket)
        return keyed.permute(
            np.arange(stop - first) if rows is None else rows, stop - first, keyed.key(self.seed, "bucket", bucket)
        )

    def to_json(self) -> dict[str, Any]:
        """The group's `actstore` attribute."""
        found = {"format_version": FORMAT_VERSION, SEAL: UNSEALED, **asdict(self)}
        if not self.short_buckets:
            del found["short_buckets"]
        return found


def _check_numbers(spec: StoreSpec) -> None:
    for outer, inner in (("shard_rows", "chunk_rows"), ("bucket_rows", "shard_rows")):
        if getattr(spec, outer) % getattr(spec, inner):
            raise ValueError(f"{outer} ({getattr(spec, outer)}) must be a multiple of {inner} ({getattr(spec, inner)})")
    chunks = spec.bucket_rows // spec.chunk_rows
    if chunks > MAX_CHUNKS:
        raise ValueError(f"a bucket has {chunks} chunks, at most {MAX_CHUNKS} are allowed")
    if chunks * (len(spec.sites) + len(PROVENANCE_ARRAYS)) > MAX_VALUES // 2:
        raise ValueError(
            f"a bucket has too many chunks of {len(spec.sites)} sites for one commit record; lower bucket_rows or "
            "raise chunk_rows"
        )
    if spec.rows != OPEN_ENDED and spec.buckets > MAX_BUCKETS:
        raise ValueError(
            f"{spec.rows} rows make {spec.buckets} buckets, at most {MAX_BUCKETS} fit in one store; raise bucket_rows"
        )
    if spec.rows != OPEN_ENDED and spec.buckets * chunks > MAX_INDEX:
        raise ValueError(
            f"{spec.rows} rows make {spec.buckets * chunks} chunks of an array, at most {MAX_INDEX} fit in one store; "
            "split the rows over several stores, or raise chunk_rows"
        )
    numbers = [b for b, _ in spec.short_buckets]
    if len(numbers) > MAX_EXTENSIONS:
        raise ValueError(f"short_buckets has {len(numbers)} entries, at most {MAX_EXTENSIONS} are allowed")
    if numbers != sorted(set(numbers)) or not all(
        0 <= b < spec.buckets - 1 and 0 < rows < spec.bucket_rows for b, rows in spec.short_buckets
    ):
        raise ValueError(
            f"short_buckets is {str(spec.short_buckets)[:60]}, expected buckets before the last, ascending"
        )


def _check_sites(spec: StoreSpec) -> None:
    if not 0 < len(spec.sites) <= MAX_SITES:
        raise ValueError(f"a store needs at least one site and has at most {MAX_SITES}, found {len(spec.sites)}")
    for name, site in spec.sites.items():
        if not _SITE_NAME.fullmatch(name) or name in _RESERVED or len(name) > MAX_NAME:
            raise ValueError(f"site name {name[:MAX_NAME]!r} can't be used: expected a name such as resid_post.12")
        _whole(f"site {name}: d", site.d, 1, MAX_D)
        raw = spec.chunk_rows * site.d * DTYPES[site.kind].itemsize
        if raw > MAX_CHUNK_BYTES:
            raise ValueError(f"site {name}: a chunk has {raw} bytes, at most {MAX_CHUNK_BYTES}; lower chunk_rows")
    if (width := sum(s.d for s in spec.sites.values())) > MAX_WIDTH:
        raise ValueError(f"the sites are {width} wide together, at most {MAX_WIDTH}; split them over several stores")


def _whole(name: str, value: object, low: int = -(1 << 63), high: int = (1 << 63) - 1) -> int:
    """An integer of any kind, numpy's too, as Python's; `ValueError` for others, booleans, and outside the bounds."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError as e:
        raise ValueError(f"{name} is {value!r}, expected a whole number") from e
    if not low <= number <= high:
        raise ValueError(f"{name} is {number}, expected {low} to {high}")
    return number


def _as_stored(provenance: dict[str, Any]) -> dict[str, Any]:
    """Provenance as a reader gets it; `ValueError` for what JSON does not hold."""
    level: list[Any] = [provenance]
    for _ in range(MAX_DEPTH):
        inner = (v for c in level for v in (c.values() if isinstance(c, dict) else c))
        level = [v for v in inner if isinstance(v, (dict, list, tuple))]
    if level:
        raise ValueError(f"provenance has values inside more than {MAX_DEPTH} others")
    try:
        text = json.dumps(provenance, allow_nan=False).encode()
        if len(text) > METADATA_LIMIT // 2:
            raise ValueError(f"{len(text)} bytes, at most {METADATA_LIMIT // 2}")
        return parse(text, dict[str, Any], "provenance")
    except (TypeError, ValueError, StoreError) as e:
        raise ValueError(f"provenance can't be stored: {brief(e)}") from e


class _WireSite(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    d: int
    encoding: str


class WireSpec(Sealed, frozen=True):
    """The group's `actstore` attribute."""

    format_version: int
    rows: int
    bucket_rows: int
    shard_rows: int
    chunk_rows: int
    seed: int
    codec: str
    sites: dict[str, _WireSite]
    provenance: dict[str, Any]
    short_buckets: Annotated[tuple[tuple[int, int], ...], msgspec.Meta(min_length=1)] | msgspec.UnsetType = (
        msgspec.UNSET
    )

    def spec(self, where: str) -> StoreSpec:
        """The spec, checked; `StoreError` names the field."""
        fields = {k: v for k, v in msgspec.structs.asdict(self).items() if v is not msgspec.UNSET and k != SEAL}
        version = fields.pop("format_version")
        if version != FORMAT_VERSION:
            raise StoreError(
                f"{where}: format version is {version}, this actstore reads {FORMAT_VERSION}; update actstore"
            )
        try:
            fields["sites"] = {name: SiteSpec(d=s.d, encoding=s.encoding) for name, s in self.sites.items()}
            return StoreSpec(**fields)
        except ValueError as e:
            raise StoreError(f"{where}: {e}") from e


class _Attributes(msgspec.Struct, frozen=True):
    actstore: WireSpec | None = None


class _Group(msgspec.Struct):
    attributes: _Attributes = _Attributes()


def spec_from_bytes(data: bytes, where: str) -> StoreSpec:
    """Parse and check the group's `zarr.json`; `StoreError` names the field."""
    found = decode(data, _Group, where).attributes.actstore
    if found is None:
        raise StoreError(f"{where}: the group has no '{ATTRIBUTE}' attribute, so this is not an activation store")
    return found.spec(where)


@dataclass(frozen=True)
class ArraySpec:
    """One zarr array of a store."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    shard_rows: int
    chunk_rows: int
    codec: codecs.CodecName

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a decoded chunk."""
        return self.chunk_rows * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of a decoded row."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    @property
    def chunks_per_shard(self) -> int:
        """Capacity of a shard."""
        return self.shard_rows // self.chunk_rows

    def shard_key(self, shard: int) -> str:
        """Object name of a shard: zarr's default chunk key encoding."""
        return "/".join([self.name, "c", str(shard), *("0" for _ in self.shape[1:])])

    def metadata(self) -> dict[str, Any]:
        """The array's `zarr.json`."""
        sharding = {
            "chunk_shape": [self.chunk_rows, *self.shape[1:]],
            "codecs": codecs.metadata(self.codec, self.dtype.itemsize),
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "index_location": "end",
        }
        return {
            **_plain_metadata(list(self.shape), [self.shard_rows, *self.shape[1:]], self.dtype.name),
            "fill_value": 0 if self.dtype.kind == "i" else 0.0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {"calibration": f"calibration/{self.name}"} if self.dtype == DTYPES["fixed"] else {},
            "dimension_names": ["row", "feature"][: len(self.shape)],
        }


def _plain_metadata(shape: list[int], chunk: list[int], data_type: str) -> dict[str, Any]:
    """What every array's `zarr.json` has."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
    }


def arrays(spec: StoreSpec) -> dict[str, ArraySpec]:
    """All arrays of a store by name: the sites, then provenance (one shard a bucket, for few small objects)."""

    def array(name: str, dtype: np.dtype[Any], shard_rows: int, *width: int) -> ArraySpec:
        shape = (spec.rows, *width)
        return ArraySpec(name, shape, dtype, shard_rows=shard_rows, chunk_rows=spec.chunk_rows, codec=spec.codec)

    sites = {name: array(name, DTYPES[s.kind], spec.shard_rows, s.d) for name, s in spec.sites.items()}
    return sites | {name: array(name, np.dtype("<i4"), spec.bucket_rows) for name in PROVENANCE_ARRAYS}


def calibration_key(site: str) -> str:
    """The one chunk of a `fixed` site's calibration."""
    return f"calibration/{site}/c/0/0"


def metadata_objects(spec: StoreSpec) -> dict[str, bytes]:
    """All `zarr.json` below the group's own, by key: of the arrays, and of calibrations [2, d], scale and offset."""
    found = {f"{a.name}/{GROUP_KEY}": dump(a.metadata()) for a in arrays(spec).values()}
    for name in sorted(spec.fixed_sites):
        shape = [2, spec.sites[name].d]
        calibration = {
            **_plain_metadata(shape, shape, "float32"),
            "fill_value": 0.0,
            "codecs": codecs.metadata("none", 4),
            "attributes": {"formula": "value = scale * code + offset"},
            "dimension_names": ["parameter", "feature"],
        }
        found[f"calibration/{name}/{GROUP_KEY}"] = dump(calibration)
    return found


def group_metadata(spec: StoreSpec) -> bytes:
    """The group's `zarr.json`."""
    return dump({"zarr_format": 3, "node_type": "group", "attributes": {ATTRIBUTE: spec.to_json()}})


def comparable(spec: StoreSpec) -> dict[str, object]:
    """The spec as dotted names with plain values, for comparing field by field."""
    sites = {name: f"{s.encoding}[{s.d}]" for name, s in spec.sites.items()}
    return dict(_flat("", {**vars(spec), "sites": sites}))


def _flat(name: str, value: object) -> Iterator[tuple[str, object]]:
    if not isinstance(value, dict):
        yield name, value
        return
    for key, inner in cast("dict[str, object]", value).items():
        yield from _flat(f"{name}.{key}" if name else key, inner)
