"""What a store is: its fixed numbers, the names of its objects, and its zarr metadata.

`StoreSpec` is the content of the group's `actstore` attribute, format version 1 (`docs/format.md`). Everything else
follows from it: how many buckets and shards there are, which rows each holds, and where each object lies. It is read
from untrusted bytes, so every field is checked before it is used.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from actstore import keyed
from actstore.errors import IntegrityError, StoreError
from actstore.store.format import codec as codecs
from actstore.store.format.bfloat16 import NATIVE as BFLOAT16

FORMAT_VERSION = 1
ATTRIBUTE = "actstore"
GROUP_KEY = "zarr.json"
PROVENANCE_ARRAYS = ("sequence", "position", "token_id")
"""Row-aligned int32 arrays beside the sites."""
EVENTS = "events"
"""Below it lie the logs of the runs that wrote the store; no reader needs them."""

SEAL = "object_crc32c"
"""Field of sealed JSON objects: crc32c of the object's bytes as they are with UNSEALED in its place."""
UNSEALED = "00000000"


def _seal(value: str) -> bytes:
    return f'"{SEAL}": "{value}"'.encode()


_SEALED = re.compile(rb'"object_crc32c": "([0-9a-f]{8})"')

Kind = Literal["bf16", "f32", "fixed"]
DTYPES: dict[Kind, np.dtype[Any]] = {"bf16": BFLOAT16, "f32": np.dtype("<f4"), "fixed": np.dtype("<i2")}
"""How each encoding is stored."""
BITS, FLOATS = np.dtype("<u2"), np.dtype("<f4")
RAW_DTYPES: dict[Kind, tuple[np.dtype[Any], ...]] = {"bf16": (BITS,), "f32": (FLOATS,), "fixed": (BITS, FLOATS)}
"""What the writer takes for each encoding: bf16 travels as its bits, `fixed` is made from either."""

_SITE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[0-9]+)?")
_RESERVED = (*PROVENANCE_ARRAYS, "c", "tokens", "commits", "manifest", "calibration", "zarr", EVENTS)
MAX_D = 1 << 20
MAX_BUCKET_ROWS = 1 << 31
MAX_ROWS = 1 << 56
OPEN_ENDED = 1 << 40
"""Planned rows of a store whose number of rows is not known yet (`StoreWriter.fix_rows` sets it)."""
MAX_CHUNK_BYTES = 1 << 28
"""Of a decoded chunk: what a reader may have to allocate for one."""
MAX_CHUNKS = 1 << 16
"""Of a bucket, hence of a shard: what bounds every index."""
MAX_INDEX = 1 << 29
"""Chunks of all arrays of a store: what bounds its manifest, which takes 7 bytes for each."""
METADATA_LIMIT = 1 << 28
"""Bytes of a metadata object that a reader will read."""
MAX_VALUES = 1 << 22
"""Of a JSON object: what bounds the memory of a parsed one, which takes 20 to 50 times its bytes."""
MAX_DEPTH = 64
"""Of lists and objects in a JSON object: what bounds recursion."""
MAX_EXTENSIONS = 1 << 10
"""Of a store: what bounds the list of its short buckets."""
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
        _check_fields(self)
        object.__setattr__(self, "sites", dict(sorted(self.sites.items())))

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

    @property
    def planned_rows(self) -> int:
        """Rows of the finished store: what is planned without the gaps behind short buckets."""
        return self.rows - sum(self.bucket_rows - rows for _, rows in self.short_buckets)

    def permutation(self, bucket: int) -> NDArray[np.int64]:
        """Stored place, within the bucket, of each of its rows [rows of the bucket]."""
        first, stop = self.bucket_range(bucket)
        return keyed.permute(np.arange(stop - first), stop - first, keyed.key(self.seed, "bucket", bucket))

    def to_json(self) -> dict[str, Any]:
        """The group's `actstore` attribute."""
        fields = asdict(self)
        short = fields.pop("short_buckets")
        return {
            "format_version": FORMAT_VERSION,
            SEAL: UNSEALED,
            **fields,
            **({"short_buckets": short} if short else {}),
        }


def _check_fields(spec: StoreSpec) -> None:
    for name in ("rows", "bucket_rows", "shard_rows", "chunk_rows", "seed"):
        value: object = getattr(spec, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}, expected a whole number")
    if not -(1 << 63) <= spec.seed < 1 << 63:
        raise ValueError(f"seed is {spec.seed}, expected a 64-bit number")
    if not 0 < spec.rows <= MAX_ROWS:
        raise ValueError(f"rows is {spec.rows}, expected 1 to {MAX_ROWS}")
    if not 0 < spec.bucket_rows <= MAX_BUCKET_ROWS:
        raise ValueError(f"bucket_rows is {spec.bucket_rows}, expected 1 to {MAX_BUCKET_ROWS}")
    if not 0 < spec.chunk_rows <= spec.shard_rows or spec.shard_rows % spec.chunk_rows:
        raise ValueError(f"shard_rows ({spec.shard_rows}) must be a multiple of chunk_rows ({spec.chunk_rows})")
    if spec.bucket_rows % spec.shard_rows:
        raise ValueError(f"bucket_rows ({spec.bucket_rows}) must be a multiple of shard_rows ({spec.shard_rows})")
    if spec.bucket_rows // spec.chunk_rows > MAX_CHUNKS:
        raise ValueError(f"a bucket has {spec.bucket_rows // spec.chunk_rows} chunks, at most {MAX_CHUNKS} are allowed")
    if 2 * (spec.bucket_rows // spec.chunk_rows) * (len(spec.sites) + len(PROVENANCE_ARRAYS)) > MAX_VALUES:
        raise ValueError(
            f"a bucket has too many chunks of {len(spec.sites)} sites for one commit record; "
            "lower bucket_rows or raise chunk_rows"
        )
    numbers = [b for b, _ in spec.short_buckets]
    if numbers != sorted(set(numbers)) or not all(
        0 <= b < spec.buckets - 1 and 0 < rows < spec.bucket_rows for b, rows in spec.short_buckets
    ):
        raise ValueError(
            f"short_buckets is {str(spec.short_buckets)[:60]}, expected buckets before the last, ascending"
        )
    if spec.codec not in codecs.CODECS:
        raise ValueError(f"codec is {spec.codec!r}, expected one of {', '.join(codecs.CODECS)}")
    if not spec.sites:
        raise ValueError("a store needs at least one site")
    chunks = spec.buckets * (spec.bucket_rows // spec.chunk_rows) * (len(spec.sites) + len(PROVENANCE_ARRAYS))
    if spec.rows != OPEN_ENDED and chunks > MAX_INDEX:
        raise ValueError(
            f"{spec.rows} rows of {len(spec.sites)} sites make {chunks} chunks, at most {MAX_INDEX} fit in one store; "
            "split the sites or rows over several stores, or raise chunk_rows"
        )
    for name, site in spec.sites.items():
        if not _SITE_NAME.fullmatch(name) or name in _RESERVED or len(name) > MAX_NAME:
            raise ValueError(f"site name {name[:MAX_NAME]!r} can't be used: expected a name such as resid_post.12")
        if type(site.d) is not int or not 0 < site.d <= MAX_D:
            raise ValueError(f"site {name}: d is {site.d!r}, expected 1 to {MAX_D}")
        raw = spec.chunk_rows * site.d * DTYPES[site.kind].itemsize
        if raw > MAX_CHUNK_BYTES:
            raise ValueError(f"site {name}: a chunk has {raw} bytes, at most {MAX_CHUNK_BYTES}; lower chunk_rows")


def spec_from_json(data: Any, where: str) -> StoreSpec:
    """Parse and check the group's `actstore` attribute; `StoreError` names the field."""
    if not isinstance(data, dict):
        raise StoreError(f"{where}: the group has no '{ATTRIBUTE}' attribute, so this is not an activation store")
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{where}: format version is {version!r}, this actstore reads {FORMAT_VERSION}; update actstore"
        )
    fields = {k: v for k, v in data.items() if k not in ("format_version", SEAL)}
    expected = set(StoreSpec.__dataclass_fields__) - {"short_buckets"}
    if set(fields) - {"short_buckets"} != expected:
        raise StoreError(f"{where}: fields are {sorted(fields)}, expected {sorted(expected)}")
    try:
        sites = {str(name): SiteSpec(**site) for name, site in fields.pop("sites").items()}
        if not isinstance(fields["provenance"], dict):
            raise TypeError(f"provenance is {fields['provenance']!r}, expected an object")
        return StoreSpec(sites=sites, short_buckets=_short_buckets(fields.pop("short_buckets", None)), **fields)
    except (TypeError, ValueError, AttributeError) as e:
        raise StoreError(f"{where}: {e}") from e


def _short_buckets(data: Any) -> tuple[tuple[int, int], ...]:
    if data is None:
        return ()
    whole = isinstance(data, list) and 0 < len(data) <= MAX_EXTENSIONS
    if not whole or not all(isinstance(p, list) and [type(v) for v in p] == [int, int] for p in data):
        raise ValueError(f"short_buckets is {str(data)[:60]}, expected 1 to {MAX_EXTENSIONS} pairs of bucket and rows")
    return tuple((bucket, rows) for bucket, rows in data)


@dataclass(frozen=True, kw_only=True)
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
        tail = list(self.shape[1:])
        sharding = {
            "chunk_shape": [self.chunk_rows, *tail],
            "codecs": codecs.metadata(self.codec, self.dtype.itemsize),
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.shard_rows, *tail]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0 if self.dtype.kind == "i" else 0.0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {"calibration": f"calibration/{self.name}"} if self.dtype == DTYPES["fixed"] else {},
            "dimension_names": ["row", "feature"][: len(self.shape)],
        }


def arrays(spec: StoreSpec) -> dict[str, ArraySpec]:
    """All arrays of a store by name: the sites, then provenance (one shard a bucket, for few small objects)."""
    common: dict[str, Any] = {"chunk_rows": spec.chunk_rows, "codec": spec.codec}
    found = {
        name: ArraySpec(name=name, shape=(spec.rows, s.d), dtype=DTYPES[s.kind], shard_rows=spec.shard_rows, **common)
        for name, s in spec.sites.items()
    }
    for name in PROVENANCE_ARRAYS:
        found[name] = ArraySpec(
            name=name, shape=(spec.rows,), dtype=np.dtype("<i4"), shard_rows=spec.bucket_rows, **common
        )
    return found


def calibration_key(site: str) -> str:
    """The one chunk of a `fixed` site's calibration."""
    return f"calibration/{site}/c/0/0"


def calibration_metadata(d: int) -> dict[str, Any]:
    """`zarr.json` of the calibration array [2, d]: row 0 is `scale`, row 1 is `offset`."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [2, d],
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2, d]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0,
        "codecs": codecs.metadata("none", 4),
        "attributes": {"formula": "value = scale * code + offset"},
        "dimension_names": ["parameter", "feature"],
    }


def metadata_objects(spec: StoreSpec) -> dict[str, bytes]:
    """All `zarr.json` below the group's own, by key."""
    found = {f"{a.name}/{GROUP_KEY}": dump(a.metadata()) for a in arrays(spec).values()}
    for name, site in spec.sites.items():
        if site.kind == "fixed":
            found[f"calibration/{name}/{GROUP_KEY}"] = dump(calibration_metadata(site.d))
    return found


def group_metadata(spec: StoreSpec) -> bytes:
    """The group's `zarr.json`."""
    return dump({"zarr_format": 3, "node_type": "group", "attributes": {ATTRIBUTE: spec.to_json()}})


def dump(data: Any) -> bytes:
    """JSON as actstore writes it: sorted keys, so that equal content is equal bytes; sealed where it has the field."""
    return seal(json.dumps(data, indent=1, sort_keys=True, allow_nan=False).encode())


def seal(data: bytes) -> bytes:
    """Put the crc32c of the object in the place of its first UNSEALED field, if it has one."""
    return data.replace(_seal(UNSEALED), _seal(f"{codecs.crc32c(data):08x}"), 1)


def check_seal(data: bytes, where: str) -> bool:
    """Whether the object is sealed; `IntegrityError` if a byte of it changed since."""
    found = _SEALED.search(data)
    if not found:
        return False
    crc = codecs.crc32c(UNSEALED.encode(), codecs.crc32c(memoryview(data)[: found.start(1)]))
    crc = codecs.crc32c(memoryview(data)[found.end(1) :], crc)
    if f"{crc:08x}" != found[1].decode():
        raise IntegrityError(f"{where}: does not match its own {SEAL}; the object is damaged")
    return True


def parse_json(data: bytes) -> Any:
    """The JSON value; `ValueError` too for NaN, infinities, more values or deeper nesting than any store needs."""
    values = sum(map(data.count, (b",", b"[", b"{")))
    if values > MAX_VALUES:
        raise ValueError(f"has {values} values, at most {MAX_VALUES} are allowed")
    parsed = json.loads(data, parse_constant=_finite, parse_float=_finite)
    level = [parsed] if isinstance(parsed, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        inner = (v for c in level for v in (c.values() if isinstance(c, dict) else c))
        level = [v for v in inner if isinstance(v, (dict, list))]
    if level:
        raise ValueError(f"has values inside more than {MAX_DEPTH} others")
    return parsed


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no JSON number")
    return value


def load_sealed(data: bytes, where: str) -> Any:
    """Parse sealed JSON; `IntegrityError` if a byte of it changed, `StoreError` if it was never sealed JSON."""
    sealed = check_seal(data, where)
    try:
        parsed = parse_json(data)
    except (ValueError, RecursionError) as e:
        raise StoreError(f"{where}: not JSON ({e})") from e
    if not sealed:
        raise IntegrityError(f"{where}: has no readable {SEAL}; it is damaged, or not actstore's")
    return parsed


def comparable(spec: StoreSpec) -> dict[str, object]:
    """The spec as dotted names with plain values, for comparing field by field."""
    sites = {name: f"{s.encoding}[{s.d}]" for name, s in spec.sites.items()}
    return _flat({**vars(spec), "sites": sites})


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in data.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
