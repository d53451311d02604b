"""Rows of groups: the prefix, the order of tokens, how rows are filled."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polarctl.model.packing import Span, alone, common_prefix, first_fit_decreasing, pack, span_of

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=4)


def test_the_prefix_ends_where_candidates_differ():
    assert common_prefix([[5, 6, 7, 8], [5, 6, 9, 8]]) == 2
    assert common_prefix([[5, 6], [7, 6]]) == 0


def test_every_candidate_keeps_a_token_of_its_own():
    assert common_prefix([[5, 6, 7], [5, 6, 7]]) == 2  # equal: the last token is not shared
    assert common_prefix([[5, 6], [5, 6, 7, 8]]) == 1
    assert common_prefix([[5, 6, 7]]) == 0  # one alone shares nothing


@given(sequences)
def test_the_prefix_is_the_longest_one(candidates):
    length = common_prefix(candidates)
    least = min(map(len, candidates)) - 1
    assert all(ids[:length] == candidates[0][:length] for ids in candidates)
    if len(candidates) > 1 and length < least:
        assert len({tuple(ids[: length + 1]) for ids in candidates}) > 1


def test_a_row_holds_each_prefix_once():
    groups = [[[1, 2, 3, 4], [1, 2, 5]], [[7, 8], [7, 9, 9, 9, 9]]]
    (row,) = pack(groups, 100)
    # Sizes: 2 + 2 + 1 = 5 and 1 + 1 + 4 = 6: the larger one first.
    assert row.members == [1, 0]
    assert row.ids == [7, 8, 9, 9, 9, 9, 1, 2, 3, 4, 5]
    assert row.positions == [0, 1, 1, 2, 3, 4, 0, 1, 2, 3, 2]
    assert row.spans == (Span(1, (1, 4)), Span(2, (2, 1)))


def test_tokens_saved_are_those_of_the_formula():
    # N (P + c) = 2 * (6 + 2) = 16 as whole sequences, P + N c = 6 + 4 = 10 in a row: bound 1.6.
    span = span_of([[1] * 6 + [2, 2], [1] * 6 + [3, 3]])
    assert (span.unshared, span.tokens) == (16, 10)


@given(st.lists(sequences, min_size=1, max_size=8), st.integers(1, 40))
def test_packing_loses_nothing_and_keeps_to_the_budget(groups, budget):
    rows = pack(groups, budget)
    assert sorted(i for row in rows for i in row.members) == list(range(len(groups)))
    for row in rows:
        assert len(row.ids) == len(row.positions) == sum(span.tokens for span in row.spans)
        assert len(row.ids) <= budget or len(row.members) == 1
        # Read back: each candidate is its prefix and its own tokens.
        at, ids = 0, row.ids
        for member, span in zip(row.members, row.spans, strict=True):
            prefix = ids[at : at + span.prefix]
            at += span.prefix
            for branch, candidate in zip(span.branches, groups[member], strict=True):
                assert prefix + ids[at : at + branch] == candidate
                assert row.positions[at : at + branch] == list(range(span.prefix, len(candidate)))
                at += branch


def test_the_largest_go_first_into_the_first_bin_with_room():
    # 7 | 5 3... budget 10: 7 opens bin 0; 5 bin 1; 4 fits bin 1 (9); 3 fits bin 0 (10); 2 opens 2.
    assert first_fit_decreasing([3, 7, 2, 5, 4], 10) == [[1, 0], [3, 4], [2]]


def test_what_is_larger_than_the_budget_goes_alone():
    assert first_fit_decreasing([50, 1], 10) == [[0], [1]]


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_candidates_alone_share_nothing(budget):
    groups = [[[1, 2, 3], [1, 2, 4]], [[1, 2, 5]]]
    rows = pack(alone(groups), budget)
    assert sum(len(row.ids) for row in rows) == 9
    assert all(span.prefix == 0 for row in rows for span in row.spans)
