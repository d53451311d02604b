"""What a data card says of the texts in a file, and of those that are not."""

from collections import Counter

import numpy as np
import pytest

from polarctl.hub import card_plots
from polarctl.hub.statistics import Statistics

MADE = {"prompt": "Go", "policy": "a", "num_tokens": 3, "finish_reason": "stop"}


def test_what_was_left_out_is_told_with_its_reason():
    found = Statistics()
    for number in range(8):
        cleaned = [["loop"], ["incomplete"], ["loop", "incomplete"], []][number % 4]
        found.add({**MADE, "output": "x" * 100, "cleaned": cleaned})
    # 3 bad rows, 4 prompts that did not fit and 5 samples without text were set aside.
    tallies = {"a": {"records": 8, "empty": 5, "unfit": 4}, "b": {"unfit": 0, "too long": 6}}
    found.add_manifest({"rejects": 12, "repeated": 2, "empty": 5, "policies": tallies})
    assert found.discards == {
        "bad rows of the input": 3,
        "prompts that a policy could not take": 4,
        "repeated prompts, taken once": 2,
        "samples without text": 5,
        "texts that are too long": 6,
    }
    assert [(count, share) for _, count, share in found.cleaned()] == [(4, 0.5), (4, 0.5)]


def test_what_pair_says_of_prompts_without_a_triple_is_taken_over():
    found = Statistics()
    counts = {"prompts": 90, "triples": 80, "draws": 85, "rejects": 0, "prompts with one policy": 7}
    roles = {"a": {"reference": 80, "rejected": 0}}
    found.add_manifest({**counts, "similar texts passed over": 30, "policies": roles})
    assert found.discards == {"prompts with one policy": 7, "similar texts passed over": 30}


def test_lengths_of_a_policy_are_kept_to_a_few_percent():
    found = Statistics()
    for size in range(1, 5001):
        found.add({**MADE, "output": "x" * size})
    (lengths,) = found.policy_lengths.values()
    assert lengths.total() == 5000 and len(lengths) < 200
    values = np.repeat(*np.array(sorted(lengths.items())).T)
    for share in (0.05, 0.25, 0.5, 0.95):
        assert np.quantile(values, share) == pytest.approx(5000 * share, rel=0.04)


def test_a_policy_is_drawn_where_its_texts_are():
    few, many = Counter({10: 25, 100: 50, 1000: 25}), Counter({7: 96, 9: 4})
    (axes,) = card_plots.policy_lengths([("few", few), ("many", many)]).figure.axes
    drawn = [line.get_xdata().tolist() for line in axes.lines]
    # 90 % of the texts, the middle half, the median.
    assert drawn == [[10, 1000], [10, 100], [100], [7, 7], [7, 7], [7]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["few", "many"]


def test_plots_are_the_same_bytes_again_and_name_what_is_not_drawn():
    fields = {"prompt": Counter({3: 5, 900: 1}), "output": Counter({0: 1, 70: 9})}
    assert card_plots.text_lengths(fields) == card_plots.text_lengths(fields)
    rows = [(f"policy {number}", Counter({5: 1})) for number in range(42)]
    drawn = card_plots.policy_lengths(rows)
    assert "2 more policies are not drawn" in drawn.figure.axes[0].get_xlabel()
    (steps,) = {tuple(patch.get_data().values) for patch in card_plots.text_lengths(
        {"output": Counter({1: 1, 2: 1, 3: 2})}).figure.axes[0].patches}  # fmt: skip
    # Ranges 1 to 1.41, to 2, to 2.83, to 4.
    assert steps == (25, 0, 25, 50)
