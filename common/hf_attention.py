"""Attention over the store of keys and values that common/hf_engine.py keeps: a row for each episode.

A step runs the next tokens of many rows as one packed sequence, and every token sees its own row alone.
"""

from dataclasses import dataclass, field
from typing import Any

from common.errors import InputError


@dataclass
class Step:
    """What the attention function needs to know about one packed sequence of S tokens."""

    store: "Store"
    rows: Any  # [S] row of each token
    columns: Any  # [S] column of each token = its position
    singles: int  # the first so many tokens are alone in their rows; these lie in [low, high) of the store
    low: int
    high: int
    places: Any  # [singles] row - low
    length: int  # columns that the singles look at
    segments: list[tuple[int, int, int, int]]  # (row, first token, tokens, column of the first) of the others
    masks: dict = field(default_factory=dict)

    def single_mask(self, window: int | None):
        """[high - low, 1, 1, length] bool: what the rows of the singles may look at."""
        import torch

        key = ("single", window)
        if key not in self.masks:
            at = torch.zeros(self.high - self.low, dtype=torch.long, device=self.columns.device)
            at[self.places] = self.columns[: self.singles]
            self.masks[key] = _visible(at[:, None, None, None], self.length, window)
        return self.masks[key]

    def segment_mask(self, index: int, window: int | None):
        """[tokens, columns] bool of one segment."""
        key = (index, window)
        if key not in self.masks:
            _, first, n, column = self.segments[index]
            self.masks[key] = _visible(self.columns[first : first + n, None], column + n, window)
        return self.masks[key]


def _visible(at, length: int, window: int | None):
    import torch

    seen = torch.arange(length, device=at.device)
    return (seen <= at) & (seen > at - window) if window else seen <= at


def attend(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, step: Step | None = None, **rest
):
    """transformers' attention interface. query [1, H, S, D], key and value [1, K, S, D] -> [1, S, H, D], None."""
    from torch.nn.functional import scaled_dot_product_attention

    if step is None or rest.get("softcap") or rest.get("s_aux") is not None:
        raise InputError("hf: does not know this model's attention (sinks or soft caps); use openai: with a server")
    keys, values = step.store.write(module.layer_idx, step.rows, step.columns, key[0], value[0])
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    query = query[0].transpose(0, 1)  # [S, H, D]
    out = query.new_empty(query.shape[0], heads, value.shape[-1])
    if step.singles:
        low, high, n = step.low, step.high, step.singles
        asked = query[:n]
        if high - low != n:  # rows that sit this step out: whatever they give is not read
            asked = query.new_zeros(high - low, *query.shape[1:]).index_copy_(0, step.places, asked)
        # The heads that share a key head stand where the query positions usually do: no copies of keys and values.
        asked = asked.reshape(high - low, heads // groups, groups, -1)
        seen = scaled_dot_product_attention(
            asked, keys[low:high, :, : step.length], values[low:high, :, : step.length],
            attn_mask=step.single_mask(sliding_window), scale=scaling).reshape(high - low, heads, -1)
        out[:n] = seen if high - low == n else seen[step.places]
    for index, (row, first, n, column) in enumerate(step.segments):
        out[first : first + n] = scaled_dot_product_attention(
            query[None, first : first + n].transpose(1, 2),
            keys[None, row, :, : column + n].repeat_interleave(groups, dim=1),
            values[None, row, :, : column + n].repeat_interleave(groups, dim=1),
            attn_mask=step.segment_mask(index, sliding_window), scale=scaling)[0].transpose(0, 1)
    return out[None], None


class Store:
    """Keys and values: per layer two tensors [rows, key heads, columns, head size], grown as needed, never shrunk."""

    def __init__(self, layers: int):
        self.keys: list[Any] = [None] * layers
        self.values: list[Any] = [None] * layers
        self.rows = self.columns = 0

    def write(self, layer: int, rows, columns, key, value):
        """Puts key [K, S, D] and value at (rows, columns); returns the layer's two tensors."""
        if self.keys[layer] is None:  # zeros, since what a mask hides still must not be NaN
            self.keys[layer] = key.new_zeros(self.rows, key.shape[0], self.columns, key.shape[2])
            self.values[layer] = value.new_zeros(self.rows, value.shape[0], self.columns, value.shape[2])
        self.keys[layer][rows, :, columns] = key.transpose(0, 1)
        self.values[layer][rows, :, columns] = value.transpose(0, 1)
        return self.keys[layer], self.values[layer]

    def resize(self, rows: int, columns: int, used: int) -> None:
        """The first `used` columns of the first rows are kept."""
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                if old is not None:
                    tensors[layer] = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
                    keep = min(rows, self.rows)
                    tensors[layer][:keep, :, :used] = old[:keep, :, :used]
        self.rows, self.columns = rows, columns

    def swap(self, one: int, other: int, used: int) -> None:
        for tensor in (*self.keys, *self.values):
            if tensor is not None:
                kept = tensor[one, :, :used].clone()
                tensor[one, :, :used] = tensor[other, :, :used]
                tensor[other, :, :used] = kept
