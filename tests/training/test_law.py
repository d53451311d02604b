"""The paper's laws, against the values that the paper prints."""

import pytest

from polarctl.training.law import (
    Law,
    batch_size,
    learning_rate,
    parse_tokens,
)


def test_the_law_gives_the_hyper_parameters_of_the_papers_models() -> None:
    # POLAR-1.8B: 0.94T tokens on a base model of 2.5T; POLAR-7B: 3.6T on 4T.
    assert f"{learning_rate(1.8e9, 2.5e12, 0.94e12):.3e}" == "1.429e-05"
    assert f"{batch_size(1.8e9, 0.94e12):.1f}" == "1939.7"
    assert f"{learning_rate(7e9, 4e12, 3.6e12):.4e}" == "1.6735e-05"
    assert f"{batch_size(7e9, 3.6e12):.1f}" == "4342.8"


def test_sizes_are_in_units_of_2_to_the_20_and_tokens_of_2_to_the_30() -> None:
    # One unit of each leaves the constants.
    assert learning_rate(2**20, 2**30, 2**30) == 0.0002306
    assert batch_size(2**20, 2**30) == 31.9032


def test_a_batch_is_a_whole_number_of_triples_and_at_least_one() -> None:
    assert Law.of(1.8e9, 2.5e12, 0.94e12).batch_size == 1940
    # 31.9032 (1e5 / 2^20)^0.06944 (1e4 / 2^30)^0.52997: 31.9 * 0.849 * 0.00216 = 0.058.
    assert Law.of(1e5, 2.5e12, 1e4).batch_size == 1


def test_the_explanation_holds_every_number_that_went_in() -> None:
    explained = Law.of(1.8e9, 2.5e12, 0.94e12).explain()
    assert "\n" not in explained
    for number in ("N = 1.8e+09", "D_p = 2.5e+12", "D_r = 9.4e+11"):
        assert number in explained


def test_the_papers_own_models_are_inside_the_fitted_range() -> None:
    assert Law.of(1.8e9, 2.5e12, 0.94e12).outside() == ""
    assert Law.of(7e9, 4e12, 3.6e12).outside() == ""


def test_what_lies_outside_is_named() -> None:
    assert "N from 5e+07 to 7.5e+09" in Law.of(70e9, 2.5e12, 1e12).outside()
    assert "3.6e+12" in Law.of(1.8e9, 2.5e12, 4e12).outside()
    both = Law.of(1e6, 2.5e12, 1e6).outside()
    assert both.startswith("extrapolated:") and "N from" in both and "D_r from" in both


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("2.5T", 2.5e12),
        ("940B", 940e9),
        ("940g", 940e9),
        ("1e12", 1e12),
        ("1E+12", 1e12),
        ("30M", 30e6),
        (" 7k ", 7e3),
        (".5T", 0.5e12),
        (12_000, 12e3),
        (1e16, 1e16),
    ],
)
def test_numbers_of_tokens_are_read(text, tokens) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    "text",
    ["", "T", "2.5.1T", "-1T", "0", "2.5 TB", "many", "1e999", "nan", "inf", "1,000", -5, True],
)
def test_what_is_no_number_of_tokens_is_refused(text) -> None:
    with pytest.raises(ValueError, match="not a number of tokens such as 2.5T"):
        parse_tokens(text)
