"""The trie layout says the same as the samples one by one: every label token, behind exactly its own prefix."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InputError
from common.prefix_tree import Sample, Trajectory, distinct_tokens, pack_per_turn, pack_tree, pad_rows


def sample(prompt, label, name="s"):
    ids = [ord(c) for c in prompt + label] if isinstance(prompt, str) else [*prompt, *label]
    return Sample(name, np.array(ids, np.int32), len(prompt))


def predictions(batches) -> Counter:
    """What is trained on, read off the rows: (tokens seen, target, weight). Only `end` says who sees whom."""
    found = Counter()
    for batch in batches:
        width = batch.ids.shape[1]
        for row, target, weight in zip(batch.rows.tolist(), batch.targets.tolist(), batch.weights.tolist()):
            line, q = divmod(row, width)
            if batch.end is None:
                seen = np.arange(q + 1)
            else:
                k = np.arange(width)
                seen = np.flatnonzero((k <= q) & (q < batch.end[line]))
            assert batch.depth[line, seen].tolist() == list(range(len(seen)))  # positions count along the path
            found[tuple(batch.ids[line, seen].tolist()), target, round(weight, 5)] += 1
    return found


def wanted(samples, weights) -> Counter:
    found = Counter()
    for s, weight in zip(samples, weights):
        for place in range(s.n_prompt, len(s.ids)):
            found[tuple(s.ids[:place].tolist()), int(s.ids[place]), round(float(np.float32(weight)), 5)] += 1
    return found


def trie_size(samples) -> int:
    return len({tuple(s.ids[: i + 1].tolist()) for s in samples for i in range(len(s.ids))})


def test_worked_by_hand():
    """The example in the docstring of the module."""
    (batch,) = pack_tree([sample("abcd", "y"), sample("abc", "x")], [0.5, 0.25], 100)
    assert "".join(map(chr, batch.ids[0])) == "abcdyx"  # sorted by token: d before x
    assert batch.depth.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert batch.end.tolist() == [[6, 6, 6, 5, 5, 6]]
    assert batch.rows.tolist() == [3, 2]  # y is predicted by d, x by c
    assert "".join(map(chr, batch.targets)) == "yx"
    assert batch.weights.tolist() == [0.5, 0.25]


def test_one_line_per_sample():
    (batch,) = pack_per_turn([sample("abc", "xy"), sample("a", "z")], [1.0, 2.0], 10)
    assert batch.ids.tolist() == [[97, 122, 0, 0, 0], [97, 98, 99, 120, 121]]
    assert batch.rows.tolist() == [0, 5 + 2, 5 + 3]


def test_label_that_was_executed_lies_on_the_way_to_the_next():
    """Where the teacher acted, its label is part of the next prompt: nothing is computed twice."""
    first, second = sample("ab", "cd"), sample("abcdef", "gh")
    (batch,) = pack_tree([second, first], [1.0, 1.0], 100)
    assert batch.n_rows == 8 == distinct_tokens([first, second])
    assert batch.end.tolist() == [[8] * 8]


@pytest.mark.parametrize("samples", [
    [sample("a", "b")],
    [sample("a", "b"), sample("a", "b")],  # the same label twice counts twice
    [sample("abc", "dex"), sample("abc", "dey")],  # two labels that differ in the last token
    [sample("abc", "d"), sample("axy", "z")],  # an overlap of one token
    [sample("abc", "d"), sample("xyz", "d")],  # none at all
    [sample("ab", "c"), sample("abc", "d"), sample("abcd", "e")],
    [sample("abc", ""), sample("ab", "cd")],  # a label without tokens
], ids=["one", "duplicates", "last-token", "one-token-overlap", "apart", "chain", "empty"])
def test_corner_cases(samples):
    weights = [1 / (i + 2) for i in range(len(samples))]
    (batch,) = pack_tree(samples, weights, 1000)
    assert batch.n_rows == trie_size(samples) == distinct_tokens(samples)
    assert predictions([batch]) == wanted(samples, weights)
    assert predictions(pack_per_turn(samples, weights, 1000)) == wanted(samples, weights)


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=8)  # three kinds of token: much is shared
many = st.lists(st.tuples(tokens, tokens), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(many, st.integers(16, 60), st.floats(0, 0.1))
def test_any_samples(pairs, max_rows, attention):
    samples = [sample(prompt, label, f"s{i}") for i, (prompt, label) in enumerate(pairs)]
    weights = [1 / (i + 2) for i in range(len(samples))]
    for batches in (pack_tree(samples, weights, max_rows, attention), pack_per_turn(samples, weights, max_rows)):
        assert all(batch.n_rows <= max_rows for batch in batches)
        assert predictions(batches) == wanted(samples, weights)
    (whole,) = pack_tree(samples, weights, 10_000)
    assert whole.n_rows == trie_size(samples) == distinct_tokens(samples)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(tokens, tokens), max_size=8))
def test_what_a_trajectory_keeps_is_what_it_was_given(pairs):
    kept = Trajectory("t")
    for turn, (prompt, label) in enumerate(pairs):
        kept.add(turn, np.array(prompt + label, np.int32), len(prompt))
    found = kept.close().samples()
    assert [(s.ids.tolist(), s.n_prompt) for s in found] == [(prompt + label, len(prompt)) for prompt, label in pairs]
    assert len(kept) == len(pairs)


def test_a_long_trajectory_is_kept_in_the_room_of_its_distinct_tokens():
    ids, kept = np.arange(30_000, dtype=np.int32), Trajectory("t")
    for turn in range(50):
        kept.add(turn, ids[: 600 * (turn + 1)], 600 * (turn + 1) - 20)
    assert len(kept.news) == 30_000 and kept.longest == 30_000


def test_growing_conversation():
    """T turns: linear instead of quadratic, whether or not the label is what was executed."""
    rng = np.random.default_rng(0)
    history, samples = rng.integers(0, 99, 40).tolist(), []
    for turn in range(12):
        action = rng.integers(0, 99, 10).tolist()
        samples.append(sample(history, action if turn % 2 else rng.integers(0, 99, 10).tolist()))
        history = history + action + rng.integers(0, 99, 10).tolist()
    (batch,) = pack_tree(samples, [1.0] * 12, 10_000)
    assert batch.n_rows <= 40 + 11 * 20 + 10 + 6 * 10
    assert predictions([batch]) == wanted(samples, [1.0] * 12)


def test_two_attempts_share_their_prompt_and_unrelated_ones_are_cut_apart():
    prompt = "the same long prompt of one task"
    attempts = [sample(prompt, "one"), sample(prompt, "two")]
    other = [sample("quite another prompt, as long as it is", "three")]
    batches = pack_tree(attempts + other, [1.0] * 3, 60)
    assert sorted(batch.n_rows for batch in batches) == [len(prompt) + 6 - 0, 38 + 5]
    (together,) = pack_tree(attempts + other, [1.0] * 3, 1000)
    assert len(pack_tree(attempts + other, [1.0] * 3, 1000, attention=0.1)) == 2  # a dense mask makes rows look in vain
    assert together.n_rows == distinct_tokens(attempts + other)


def test_padding_rows_see_themselves_alone():
    samples = [sample("ab", "c"), sample("ab", "d")]
    (batch,) = pack_tree(samples, [1.0, 1.0], 100)
    padded = pad_rows(batch, 8)
    assert padded.end.tolist() == [[4, 4, 3, 4, 5, 6, 7, 8]]
    assert predictions([padded]) == predictions([batch])


def test_what_does_not_fit_is_refused_by_name():
    with pytest.raises(InputError, match="turn 7.*--tokens-per-batch to at least 9"):
        pack_tree([sample("abcdefgh", "i", name="the label of t.i1.a0, turn 7,")], [1.0], 8)


def test_packs_long_trajectories_fast():
    """50 turns up to 30K tokens: seconds at the most, for there is no Python loop per token."""
    rng = np.random.default_rng(0)
    whole = rng.integers(0, 50_000, 30_000)
    cuts = np.linspace(2_000, 29_900, 50).astype(int)
    samples = [sample(whole[:cut], rng.integers(0, 50_000, 100), name=str(cut)) for cut in cuts]
    begun = time.process_time()
    (batch,) = pack_tree(samples, [1.0] * 50, 65_536)
    assert time.process_time() - begun < 2
    assert batch.n_rows == cuts[-1] + 50 * 100
