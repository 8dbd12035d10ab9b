"""Adapters: the forms in which SAE trainers take activations.

A trainer wants one of three things of a data set:

- something to loop over once an epoch: that is an `ActivationDataset` as it is (overcomplete);
- an iterator that never ends, for `next()`: `endless` (SAELens, sparsify's `SparseCoder`, OpenAI-style loops);
- something endless that is begun more than once, for a look at the first batch or for a norm, before training itself
  begins: `Restarting` (dictionary_learning) and `token_batches` (llamascopium).

They only shape data: no trainer is imported, and `docs/trainers.md` has the lines that connect each. Batches are passed
on as they are, the consumer's own memory, to be changed in place at will; `dtype`, `device` and `normalize` are the
data set's to decide, and so is the position: `dataset.state_dict()` after a batch is the state after that batch.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actstore.errors import StreamError
from actstore.stream.columns import normalising_factor
from actstore.stream.dataset import ActivationDataset

STATE_FILE = "actstore_stream.json"
"""Where `state_saver` puts the data set's state, inside a trainer's checkpoint folder."""


def endless(batches: Iterable[Any]) -> Iterator[Any]:
    """Batch after batch and epoch after epoch: `next()` never raises StopIteration.

    `batches` is an `ActivationDataset`, or a DataLoader around one; what it yields is passed on. Raises StreamError if
    there is no batch in an epoch. Load a state before the first `next()`, not in between.
    """
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise StreamError("the store has fewer rows than one batch; lower batch_size or capture more rows")


class Restarting:
    """Endless batches from a fixed place: every `iter()` begins where the data set stood when this was made.

    So a trainer that takes a batch for a look, or a hundred for a norm, and then begins again loses none, and after
    `load_state_dict` (before this is made) it goes on exactly. Only the latest `iter()` is good.
    """

    def __init__(self, dataset: ActivationDataset, *, shape: Callable[[Any], Any] = lambda batch: batch) -> None:
        """Read from `dataset`, each batch as `shape` returns it; `config` is its `source`."""
        self._dataset, self._shape, self._start = dataset, shape, dataset.state_dict()
        self.config = source(dataset)

    def __iter__(self) -> Iterator[Any]:
        """Batches from the start again, without end."""
        self._dataset.load_state_dict(self._start)
        return map(self._shape, endless(self._dataset))


def token_batches(dataset: ActivationDataset, *, names: Mapping[str, str] | None = None) -> Restarting:
    """The activation stream of llamascopium: `{hook: [B, d], ..., "tokens": [B], "mask": [B]}`, without end.

    Args:
        dataset: opened with `with_rows=True`, for the token ids.
        names: what to call each site, such as {"resid_post.12": "blocks.12.hook_resid_post"}; others keep their name.

    `tokens` are int64 ids, `mask` is all 1 (int64): a store holds kept positions only. Raises ValueError for
    names that do not fit the sites, and at the first batch if there are no token ids.

    """
    unknown = set(names or {}) - set(dataset.sites)
    if unknown:
        raise ValueError(f"names has {sorted(unknown)}, but the data set reads {list(dataset.sites)}")
    called = {site: (names or {}).get(site, site) for site in dataset.sites}
    if len({*called.values(), "tokens", "mask"}) < len(called) + 2:
        raise ValueError(
            f"the sites would be called {sorted(called.values())}; names must differ, also from tokens, mask"
        )

    def shape(batch: Any) -> dict[str, Tensor]:
        if not isinstance(batch, dict) or "token_id" not in batch:
            raise ValueError("the data set has no token ids; open it with with_rows=True")
        tokens = batch["token_id"].long()
        return {name: batch[site] for site, name in called.items()} | {
            "tokens": tokens,
            "mask": torch.ones_like(tokens),
        }

    return Restarting(dataset, shape=shape)


def scaling_factor(dataset: ActivationDataset, site: str | None = None) -> float:
    """The factor that brings the root mean square norm of a site's batches to sqrt(d): `sqrt(d / E||x||^2)`.

    From the statistics of all committed rows, whatever the data set's filter; no batch is read. Set it as
    `trainer.activation_scaler.scaling_factor` and SAELens does not spend batches on its own estimate, which is
    `sqrt(d) / E||x||` (`activation_scaler.py` of sae-lens 6.54.12). That is larger by `sqrt(1 + v)`, where v is the
    variance of the norm over its squared mean: equal for rows of one length. The divisor of Gemma Scope and of
    dictionary_learning, which makes E||x||^2 = 1, is `sqrt(E||x||^2) = sqrt(d) / scaling_factor`.

    `site` may be left out if the data set has one. Raises StreamError if the statistics are zero or not finite.
    """
    if site is None:
        if len(dataset.sites) != 1:
            raise ValueError(f"the data set reads {list(dataset.sites)}; say which site")
        site = dataset.sites[0]
    column, mean_sq_norm = dataset.columns[site], dataset.mean_sq_norm(site)
    return math.sqrt(column.shape[0]) * normalising_factor(mean_sq_norm, site) / column.factor


def state_saver(dataset: ActivationDataset) -> Callable[[Path | None], None]:
    """SAELens' `save_checkpoint_fn`: the data set's state goes into each checkpoint folder, as `STATE_FILE`.

    Counted at yield, so it is the position after the batch that the checkpoint was last trained on.
    """

    def save_checkpoint(checkpoint_path: Path | None) -> None:
        if checkpoint_path is not None:
            (Path(checkpoint_path) / STATE_FILE).write_text(json.dumps(dataset.state_dict()), encoding="utf-8")

    return save_checkpoint


def load_state(dataset: ActivationDataset, checkpoint_path: str | Path) -> None:
    """Continue after the last batch of a checkpoint of `state_saver`; MismatchError if the plan is another."""
    path = Path(checkpoint_path) / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise StreamError(f"{path} holds no data set's state ({e}); was it saved with state_saver?") from e
    dataset.load_state_dict(state)


def source(dataset: ActivationDataset) -> dict[str, Any]:
    """Where batches come from, as JSON values: the store's URL, sites, seed and the rest of the reading plan."""
    return {"url": " + ".join(store.url for store in dataset.stores), **dataset.state_dict()["plan"]}
