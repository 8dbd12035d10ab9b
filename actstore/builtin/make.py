"""Make the built-in text, tokenizer and model again from unpacked Debian packages, and measure the model.

Promises: nothing is downloaded; the same packages and libraries give the same bytes of text, split and tokenizer; the
model is trained on the train split alone; `figures.json` is measured on the weights as shipped (bfloat16, read back
from disk). The learning-rate schedule follows the clock, so the weights differ between runs (`--steps` fixes it).

    python -m actstore.builtin.make --source DIR --out DIR --minutes 45
    python -m actstore.builtin.make --evaluate-only
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
import torch
import transformers
import tyro
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

PAD, EOS, BOS, UNK = 0, 1, 2, 3
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
VOCAB = 4096
LENGTH = 256
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "query_pre_attn_scalar": 48,
    "sliding_window": 128,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
    "attn_implementation": "eager",  # the others may leave the soft-capping out
}
HELDOUT_PARTS = 20  # one part in this many is held out
console = Console()


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to make, from where, and for how long to train."""

    source: Path | None = None
    """Root of the unpacked packages (the directory that holds `usr`); needed unless `--evaluate-only`."""
    out: Path = Path(__file__).parent
    """Where `text/`, `model/` and `figures.json` are written, or read with `--evaluate-only`."""
    evaluate_only: bool = False
    """Measure the files under `out` and print the figures; write nothing."""
    minutes: float = 45.0
    """Training time; the learning rate falls to zero at its end."""
    steps: int = 0
    """If not 0: train this many steps and ignore `minutes`."""
    batch: int = 8
    """Sequences per step."""
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    compile: bool = True
    """Train through `torch.compile` (about 1.7 times as fast on a CPU; needs a C++ compiler)."""
    threads: int = 2
    seed: int = 0


class Document(NamedTuple):
    """One row of the text files."""

    source: str
    title: str
    text: str


# Text ------------------------------------------------------------------------------------------------------------


def read_bible(root: Path) -> Iterator[Document]:
    """One document per chapter of the King James Version, as printed by the package's own reader."""
    command = [root / "usr/bin/bible", "-p", root / "usr/lib", "-l100000", "gen1:1-rev22:21"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    chapters = re.split(r"^(\w[\w ]* \d+)$", printed, flags=re.MULTILINE)[1:]
    for title, body in zip(chapters[::2], chapters[1::2], strict=True):
        verses = (re.sub(r"^\s*\d+\s+", "", line) for line in body.splitlines())
        yield Document("kjv", title, " ".join(verse.strip() for verse in verses if verse.strip()))


def unwrap(paragraph: str, verse_indent: int) -> str:
    """Join the lines of a prose paragraph; keep the lines of one that is indented like verse or program text."""
    lines = paragraph.splitlines()
    if all(len(line) - len(line.lstrip()) >= verse_indent for line in lines):
        return "\n".join(line.strip() for line in lines)
    return " ".join(line.strip() for line in lines)


def clean_entry(entry: str, verse_indent: int) -> str:
    """Unwrap one dictionary entry and drop the mark-up of its cross references and empty pronunciations."""
    entry = re.sub(r"^(.+)\n (?=\S)", r"\1, ", entry.strip("\n"))
    head, *paragraphs = (unwrap(part, verse_indent) for part in re.split(r"\n\s*\n", entry))
    head = re.sub(r", //(?=,|$)", "", head)
    body = re.sub(r"\{\s*([^{}]*?)\s*\}", r"\1", "\n".join([head, *paragraphs]))
    return re.sub(r"  +", " ", body).strip()


def read_dictionary(path: Path, source: str, first: str, headword: str, verse_indent: int) -> Iterator[Document]:
    """Consecutive entries of a dictd database from headword `first` on, gathered into documents of some 1.5 kB."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8").replace("\xa0", " ").replace("\xad", "")
    text = re.sub(r"^.*[\u2500-\u257f\u25a1].*\n", "", text[text.index(f"\n{first}") :], flags=re.MULTILINE)  # tables
    text = re.sub(r"\n \S+\s*$", "", text)  # the index alphabet that closes the database
    yield from gather(source, (clean_entry(entry, verse_indent) for entry in re.split(rf"\n\n(?={headword})", text)))


def gather(source: str, entries: Iterable[str], least: int = 1500) -> Iterator[Document]:
    """Join entries until a document has at least `least` characters; name it after its first and last headword."""
    held: list[str] = []
    for entry in [*entries, ""]:
        if entry:
            held.append(entry)
        if held and (not entry or sum(map(len, held)) >= least):
            first, last = (re.split(r", | \(|: |\. |\.?\n", part[:60])[0].strip() for part in (held[0], held[-1]))
            yield Document(source, f"{first} - {last}", "\n\n".join(held))
            held = []


def read_wordnet(root: Path) -> Iterator[Document]:
    """Definitions with a quoted example, in database order (by subject); about four documents in nine are kept."""
    for kind, name in {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}.items():
        entries: list[str] = []
        for line in (root / f"usr/share/wordnet/data.{kind}").read_text(encoding="ascii").splitlines():
            data, _, gloss = line.partition(" | ")
            if line.startswith(" ") or '; "' not in gloss:
                continue
            fields = data.split(" ")
            words = ", ".join(fields[4 : 4 + 2 * int(fields[3], 16) : 2])
            words = re.sub(r"\(\w+\)(?=,|$)", "", words).replace("_", " ")  # markers of position, as in main(a)
            entries.append(f"{words} ({name}): {gloss.strip()}")
        yield from (document for document in gather("wordnet", entries) if part_of(document, 9) < 4)


def part_of(document: Document, parts: int) -> int:
    """A part number from a keyed hash of the text alone, so that order and other documents do not matter."""
    digest = hashlib.blake2b(document.text.encode(), key=f"actstore {parts}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) % parts


def build_text(root: Path, out: Path) -> None:
    """Write the train and held-out documents."""
    dictd = root / "usr/share/dictd"
    documents = [
        *read_bible(root),
        *read_dictionary(dictd / "jargon.dict.dz", "jargon", "(TM)", r"\S", 8),
        *read_dictionary(dictd / "devil.dict.dz", "devil", "ABASEMENT", r"[A-Z][A-Z' -]+[,.(]", 2),
        *read_wordnet(root),
    ]
    (out / "text").mkdir(parents=True, exist_ok=True)
    for name, heldout in {"train": False, "heldout": True}.items():
        rows = [document for document in documents if (part_of(document, HELDOUT_PARTS) == 0) == heldout]
        table = pa.Table.from_pylist([row._asdict() for row in rows])
        path = out / f"text/{name}.parquet"
        pq.write_table(table, path, compression="zstd", compression_level=19)
        console.log(f"{path}: {len(rows)} documents, {sum(len(row.text) for row in rows)} characters")


def read_text(path: Path) -> list[str]:
    """The `text` column of one of the text files."""
    return pq.read_table(path, columns=["text"]).column("text").to_pylist()


# Tokens ----------------------------------------------------------------------------------------------------------


def build_tokenizer(texts: list[str], model_dir: Path) -> None:
    """Train byte-level BPE on the train text and save it for `AutoTokenizer`."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=True))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=model, clean_up_tokenization_spaces=False, **names)
    wrapped.save_pretrained(model_dir)


def encode(texts: list[str], model_dir: Path) -> list[np.ndarray]:
    """Token ids of each document, closed by EOS."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [np.array([*document, EOS], dtype=np.int64) for document in ids]


def pack(stream: np.ndarray) -> Tensor:
    """Cut a token stream into sequences of `LENGTH` tokens that each start with BOS; a short rest is dropped."""
    body = LENGTH - 1
    rows = stream[: len(stream) // body * body].reshape(-1, body)
    return torch.from_numpy(np.pad(rows, ((0, 0), (1, 0)), constant_values=BOS))


def batches(documents: list[np.ndarray], size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches; each epoch takes the documents in a new order, cut at new places."""
    rng = np.random.default_rng(seed)
    while True:
        stream = np.concatenate([documents[index] for index in rng.permutation(len(documents))])
        rows = pack(stream[rng.integers(LENGTH) :])
        rows = rows[torch.from_numpy(rng.permutation(len(rows)))]
        yield from rows[: len(rows) // size * size].split(size)


# Model -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def heldout_loss(model: nn.Module, rows: Tensor) -> float:
    """Mean cross-entropy in nats over the targets that are ordinary tokens."""
    model.eval()
    total, count = 0.0, 0
    for batch in rows.split(32):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        target = batch[:, 1:].masked_fill(batch[:, 1:] < len(SPECIAL), -100)
        total += functional.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="sum").item()
        count += int((target >= 0).sum())
    return total / count


def unigram_entropy(rows: Tensor) -> tuple[float, int]:
    """Entropy in nats of the very targets that `heldout_loss` scores, and their number."""
    targets = rows[:, 1:]
    counts = torch.bincount(targets[targets >= len(SPECIAL)], minlength=VOCAB).double()
    return torch.special.entr(counts / counts.sum()).sum().item(), int(counts.sum())


def new_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """AdamW that decays matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def train(config: Config, documents: list[np.ndarray], heldout: Tensor) -> tuple[Gemma2ForCausalLM, dict[str, Any]]:
    """Train with warm-up and a cosine schedule; keep the weights of the best held-out loss (read every 1000 steps)."""
    torch.manual_seed(config.seed)
    model = Gemma2ForCausalLM(Gemma2Config(**SHAPE))
    forward: Callable[..., Any] = torch.compile(model) if config.compile else model
    optimizer = new_optimizer(model, config)
    best, kept, running, start, step = math.inf, model.state_dict(), 0.0, time.monotonic(), 0
    for step, batch in enumerate(batches(documents, config.batch, config.seed), start=1):
        done = step / config.steps if config.steps else (time.monotonic() - start) / (60 * config.minutes)
        rate = config.learning_rate * min(1.0, step / 150) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(input_ids=batch[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running += (loss.item() - running) / min(step, 100)
        if step % 100 == 0:
            console.log(f"step {step}, {done:.1%} done, rate {rate:.2e}, train loss {running:.4f}")
        if step % 1000 == 0 or done >= 1:
            now = heldout_loss(model, heldout)
            model.train()
            console.log(f"step {step}: held-out loss {now:.4f}")
            if now < best:
                best, kept = now, {name: value.clone() for name, value in model.state_dict().items()}
        if done >= 1:
            break
    model.load_state_dict(kept)
    minutes = (time.monotonic() - start) / 60
    return model, {"steps": step, "tokens_seen": step * config.batch * LENGTH, "minutes": round(minutes, 1)}


# Files -----------------------------------------------------------------------------------------------------------


def evaluate(out: Path) -> dict[str, Any]:
    """Measure the files under `out` as they are on disk."""
    heldout = pack(np.concatenate(encode(read_text(out / "text/heldout.parquet"), out / "model")))
    entropy, count = unigram_entropy(heldout)
    models = {
        dtype: Gemma2ForCausalLM.from_pretrained(out / "model", attn_implementation="eager", dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }
    losses = {dtype: heldout_loss(model, heldout) for dtype, model in models.items()}
    packages = {module.__name__: str(module.__version__) for module in (torch, transformers, tokenizers)}
    return {
        "heldout_loss": round(losses[torch.float32], 4),
        "heldout_loss_bf16": round(losses[torch.bfloat16], 4),
        "unigram_entropy": round(entropy, 4),
        "heldout_tokens": count,
        "train_tokens": sum(map(len, encode(read_text(out / "text/train.parquet"), out / "model"))),
        "parameters": models[torch.float32].num_parameters(),
        "versions": {"python": platform.python_version(), **packages},
    }


def make(config: Config, root: Path) -> dict[str, Any]:
    """Make every file under `config.out`; return the figures."""
    model_dir = config.out / "model"
    build_text(root, config.out)
    texts = read_text(config.out / "text/train.parquet")
    build_tokenizer(texts, model_dir)
    documents = encode(texts, model_dir)
    heldout = pack(np.concatenate(encode(read_text(config.out / "text/heldout.parquet"), model_dir)))
    entropy, count = unigram_entropy(heldout)
    console.log(f"{sum(map(len, documents))} train tokens, {count} held-out tokens of unigram entropy {entropy:.4f}")
    model, spent = train(config, documents, heldout)
    model.bfloat16().save_pretrained(model_dir)
    (model_dir / "generation_config.json").unlink(missing_ok=True)
    figures = evaluate(config.out) | spent
    (config.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def main(config: Config) -> None:
    """Make or measure, then print the figures."""
    torch.set_num_threads(config.threads)
    if config.evaluate_only:
        console.print_json(data=evaluate(config.out))
    elif config.source is None:
        raise SystemExit("--source is needed unless --evaluate-only is given")
    else:
        console.print_json(data=make(config, config.source))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
