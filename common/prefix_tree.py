"""Packs training samples into rows for the model: on the prefix tree, every shared token once, or one sample per line.

A sample is a prompt and its label as token ids. The T samples of a trajectory are prefixes of each other for the most
part. Inserted into a trie and laid out depth first, they give one sequence in which every distinct token stands once:

    samples  a b c | x      layout   row    0  1  2  3  4  5        query q may see key k  iff  k <= q < end[k]
             a b c d | y             token  a  b  c  x  d  y        position of row k      =    depth[k]
                                     depth  0  1  2  3  3  4        x is predicted by row 2, y by row 4
                                     end    6  6  6  4  6  6

`end[k]` is the end of the subtree of row k. A row sees its ancestors and itself, at the positions where they stand in
the sample, so its hidden state is that of the sample alone. The trie shares the tokens that are equal and nothing
else: whatever a chat template does to old turns, the result is right, it only shares less.

There is a Python loop per sample and none per token. What this does not do: it neither cuts nor drops a sample; what
is longer than a micro-batch is refused by name.
"""

from array import array
from dataclasses import dataclass
from typing import Sequence

import numpy as np

from common.errors import InputError


BATCH_COST = 16  # what starting a batch costs, in rows: keeps the packer from making crumbs


@dataclass(frozen=True, eq=False)
class Sample:
    """One state and its label. ids[n_prompt:] are trained on; each token is predicted by the row before it."""

    name: str  # trajectory id and turn, for messages
    ids: np.ndarray  # (length,) int32
    n_prompt: int

    @property
    def n_label(self) -> int:
        return len(self.ids) - self.n_prompt


class Trajectory:
    """The samples of one trajectory in little memory: of each, only what the one before it does not begin with.

    T samples of a long trajectory take the room of its distinct tokens, not T / 2 times that.
    """

    def __init__(self, name: str):
        self.name = name
        self.turns, self.n_prompt, self.length, self.shared = (array("i") for _ in range(4))
        self.news = array("i")  # the ids of each sample after the ones that it shares
        self._last = np.empty(0, np.int32)

    def add(self, turn: int, ids: np.ndarray, n_prompt: int) -> None:
        """ids (length,) int32 of the state and label at `turn`; ids[n_prompt:] are trained on."""
        shared = _common(self._last, ids)
        for column, value in zip((self.turns, self.n_prompt, self.length, self.shared), (turn, n_prompt, len(ids), shared)):
            column.append(value)
        self.news.frombytes(np.ascontiguousarray(ids[shared:], np.int32).tobytes())
        self._last = ids

    def close(self) -> "Trajectory":
        """Nothing more will be added."""
        self._last = None
        return self

    def __len__(self) -> int:
        return len(self.turns)

    @property
    def longest(self) -> int:
        return max(self.length)

    def samples(self) -> list[Sample]:
        """Every sample with all its ids."""
        samples, ids, start = [], np.empty(0, np.int32), 0
        for turn, n_prompt, length, shared in zip(self.turns, self.n_prompt, self.length, self.shared):
            stop = start + length - shared
            ids = np.concatenate([ids[:shared], np.frombuffer(self.news, np.int32)[start:stop]])
            samples.append(Sample(f"the label of {self.name}, turn {turn},", ids, n_prompt))
            start = stop
        return samples


@dataclass(eq=False)
class Batch:
    """Rows for one forward pass, B lines of L rows, and the predictions to take from them."""

    ids: np.ndarray  # (B, L) int64
    depth: np.ndarray  # (B, L) int64, the position of a row in its sample
    end: np.ndarray | None  # (1, L) int64, end of the row's subtree; None: one sample per line, padded on the right
    rows: np.ndarray  # (P,) int64 into the B * L rows: the row that predicts
    targets: np.ndarray  # (P,) int64, the token that it should predict
    weights: np.ndarray  # (P,) float32, the share of that token in the loss of the optimiser step

    @property
    def n_rows(self) -> int:
        return self.ids.size


def pack_tree(
    samples: Sequence[Sample], weights: Sequence[float], max_rows: int, attention: float = 0.0
) -> list[Batch]:
    """Batches of one line each, at most `max_rows` rows, that compute the shared tokens of `samples` once.

    weights[i] is the weight of every trained token of samples[i]. Samples of several trajectories may come together:
    two attempts at one task share their prompt. Where not all fits into one batch, it is cut where little is shared,
    and what both sides share is computed on both. `attention` is what looking at one more row costs a row, in rows,
    where the mask is dense: then unrelated trajectories are better apart. Raises InputError if one sample is longer
    than max_rows.
    """
    refuse_long(samples, max_rows)
    order, shared = _sorted(samples)
    samples, weights = [samples[i] for i in order], [weights[i] for i in order]
    batches = []
    for start, stop in _cut([len(s.ids) for s in samples], shared, max_rows, attention):
        batches.append(_tree(samples[start:stop], weights[start:stop], shared[start:stop]))
    return batches


def pack_per_turn(samples: Sequence[Sample], weights: Sequence[float], max_rows: int) -> list[Batch]:
    """Batches of one sample per line, padded on the right, at most `max_rows` rows in all; samples of like length."""
    refuse_long(samples, max_rows)
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].ids))
    groups: list[list[int]] = []
    for i in order:
        if not groups or len(samples[i].ids) * (len(groups[-1]) + 1) > max_rows:
            groups.append([])
        groups[-1].append(i)
    return [_lines([samples[i] for i in group], [weights[i] for i in group]) for group in groups]


def distinct_tokens(samples: Sequence[Sample]) -> int:
    """Nodes of the trie of `samples`: what has to be computed at the least."""
    if not samples:
        return 0
    _, shared = _sorted(samples)
    return sum(len(sample.ids) for sample in samples) - sum(shared)


def pad_rows(batch: Batch, length: int) -> Batch:
    """The same tree batch with rows up to `length` that see themselves alone and predict nothing."""
    more = length - batch.ids.shape[1]
    new = np.arange(batch.ids.shape[1], length) + 1
    return Batch(
        ids=np.pad(batch.ids, ((0, 0), (0, more))),
        depth=np.pad(batch.depth, ((0, 0), (0, more))),
        end=np.concatenate([batch.end, new[None, :]], axis=1),
        rows=batch.rows,
        targets=batch.targets,
        weights=batch.weights,
    )


def refuse_long(samples: Sequence[Sample], max_rows: int) -> None:
    """Raises InputError that names the longest sample if it is longer than a batch may be."""
    longest = max(samples, key=lambda sample: len(sample.ids))
    if len(longest.ids) > max_rows:
        raise InputError(
            f"{longest.name} has {len(longest.ids)} tokens and a micro-batch holds {max_rows}: raise "
            f"--tokens-per-batch to at least {len(longest.ids)}, or lower --max-context to leave such labels out"
        )


def _sorted(samples: Sequence[Sample]) -> tuple[list[int], list[int]]:
    """The samples in the order of their tokens, and how many leading tokens each shares with the one before it.

    In this order a sample shares with all before it no more than with its neighbour. Big-endian bytes sort as the
    numbers do, and a prefix stands before what it is a prefix of.
    """
    keys = [sample.ids.astype(">u4").tobytes() for sample in samples]
    order = sorted(range(len(samples)), key=keys.__getitem__)
    shared = [0]
    for one, other in zip(order, order[1:]):
        shared.append(_common(samples[one].ids, samples[other].ids))
    return order, shared


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading tokens two samples have in common."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def _cut(lengths: list[int], shared: list[int], max_rows: int, attention: float) -> list[tuple[int, int]]:
    """Where to cut the sorted samples into batches of at most max_rows: the cheapest way, by dynamic programming."""
    n = len(lengths)
    shared = np.array(shared)
    before = np.concatenate([[0], np.cumsum(np.array(lengths) - shared)])  # rows of the first i samples in one batch
    best, first = np.zeros(n + 1), np.zeros(n + 1, dtype=int)
    for stop in range(1, n + 1):
        rows = before[stop] - before[:stop] + shared[:stop]  # of start..stop: the first sample whole, the others' news
        total = best[:stop] + BATCH_COST + rows + attention * rows.astype(float) ** 2
        total[rows > max_rows] = np.inf
        first[stop] = np.argmin(total)
        best[stop] = total[first[stop]]
    cuts = []
    while n:
        cuts.append((int(first[n]), n))
        n = int(first[n])
    return cuts[::-1]


def _tree(samples: Sequence[Sample], weights: Sequence[float], shared: Sequence[int]) -> Batch:
    """One trie, depth first. `samples` are sorted; shared[i] tokens of samples[i] lie on the path of samples[i - 1]."""
    shared = [0, *shared[1:]]  # the first one's neighbour is in another batch
    size = sum(len(sample.ids) - same for sample, same in zip(samples, shared))
    ids, depth, end = np.empty(size, np.int64), np.empty(size, np.int64), np.full(size, size, np.int64)
    path = np.empty(max(len(sample.ids) for sample in samples), np.int64)  # the row of each token of this sample
    rows, targets, shares = [], [], []
    filled = length_before = 0
    for sample, weight, same in zip(samples, weights, shared):
        length = len(sample.ids)
        end[path[same:length_before]] = filled  # here the layout leaves these rows' subtrees
        added = slice(filled, filled + length - same)
        ids[added] = sample.ids[same:]
        depth[added] = np.arange(same, length)
        path[same:length] = np.arange(added.start, added.stop)
        rows.append(path[sample.n_prompt - 1 : length - 1].copy())
        targets.append(sample.ids[sample.n_prompt :])
        shares.append(np.full(sample.n_label, weight))
        filled, length_before = added.stop, length
    return Batch(
        ids=ids[None, :],
        depth=depth[None, :],
        end=end[None, :],
        rows=np.concatenate(rows),
        targets=np.concatenate(targets).astype(np.int64),
        weights=np.concatenate(shares).astype(np.float32),
    )


def _lines(samples: Sequence[Sample], weights: Sequence[float]) -> Batch:
    width = max(len(sample.ids) for sample in samples)
    ids = np.zeros((len(samples), width), np.int64)
    for line, sample in zip(ids, samples):
        line[: len(sample.ids)] = sample.ids
    rows = [i * width + np.arange(s.n_prompt - 1, len(s.ids) - 1) for i, s in enumerate(samples)]
    return Batch(
        ids=ids,
        depth=np.broadcast_to(np.arange(width), ids.shape).copy(),
        end=None,
        rows=np.concatenate(rows),
        targets=np.concatenate([s.ids[s.n_prompt :] for s in samples]).astype(np.int64),
        weights=np.concatenate([np.full(s.n_label, w) for s, w in zip(samples, weights)]).astype(np.float32),
    )
