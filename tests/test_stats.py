"""Statistics against values computed by hand, and against SciPy's own tests where it has them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

import mtl
from mtl.evaluation import mean_score
from mtl.findings import mean_score as of_cell
from mtl.scores import bounded
from mtl.stats import delta_m, estimate, holm, permutation_p, seeds_needed, smallest_p

D = [0.3, -0.1, 0.4, 0.2, 0.5]


def test_the_t_interval_is_the_textbooks() -> None:
    found = estimate([1.0, 2.0, 3.0, 6.0])  # mean 3, deviations -2 -1 0 3, sd sqrt(14/3), t(3, 0.975) = 3.182446
    half = 3.1824463 * math.sqrt(14 / 3) / 2
    assert (found.n, found.mean, found.method) == (4, 3.0, "t")
    assert found.sd == pytest.approx(math.sqrt(14 / 3))
    assert (found.low, found.high) == (pytest.approx(3 - half), pytest.approx(3 + half))
    theirs = scipy_stats.ttest_1samp([1.0, 2.0, 3.0, 6.0], 0).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(theirs.low), pytest.approx(theirs.high))


def test_one_value_has_no_interval_and_equal_values_one_of_width_zero() -> None:
    assert (estimate([2.0]).mean, estimate([2.0]).low, estimate([2.0]).sd) == (2.0, None, None)
    for n in (3, 30):
        assert (estimate([2.0] * n).low, estimate([2.0] * n).high) == (2.0, 2.0)


def test_from_twenty_values_on_the_interval_is_the_bootstraps() -> None:
    x = np.random.default_rng(1).exponential(size=25)  # skewed: BCa is not symmetric about the mean, t is
    assert estimate(x[:19]).method == "t"
    found = estimate(x)
    assert found.method == "BCa"
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.mean > 1.1 * (found.mean - found.low)
    assert found == estimate(x)  # seeded
    theirs = scipy_stats.bootstrap((x,), np.mean, method="BCa", n_resamples=20_000, rng=np.random.default_rng(7))
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.02)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.02)


@pytest.mark.parametrize(("n", "least"), [(3, 0.92), (6, 0.92), (24, 0.90)])
def test_intervals_cover_the_mean_about_as_often_as_they_say(n: int, least: float) -> None:
    random, inside = np.random.default_rng(0), 0
    for _ in range(300):
        found = estimate(random.normal(5, 2, n))
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 5 <= found.high
    assert least <= inside / 300 <= 0.985


def test_permutation_by_hand() -> None:
    # of 1, 2, 4 with any signs the sums are 7, 5, 3 and 1, of either sign once each
    assert permutation_p([1.0, 2.0, 4.0]) == 2 / 8
    assert permutation_p([-1.0, 2.0, 4.0]) == 4 / 8
    assert permutation_p([1.0, 2.0, -4.0]) == 1.0
    assert permutation_p([0.0, 0.0]) == 1.0
    assert permutation_p([0.1] * 3 + [0.2]) == 2 / 16  # rounding must not cost the tie


def test_permutation_agrees_with_brute_force_and_with_scipy() -> None:
    sums = [abs(sum(s * d for s, d in zip(signs, D, strict=True))) for signs in itertools.product((1, -1), repeat=len(D))]
    assert permutation_p(D) == pytest.approx(np.mean([s >= sum(D) - 1e-9 for s in sums]))
    theirs = scipy_stats.permutation_test((D,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert permutation_p(D) == pytest.approx(theirs.pvalue)


def test_permutation_of_many_pairs_is_sampled_and_repeatable() -> None:
    random = np.random.default_rng(3)
    d = random.normal(0.3, 1.0, 30)
    assert permutation_p(d) == permutation_p(d)
    t = scipy_stats.ttest_1samp(d, 0).pvalue
    assert permutation_p(d) == pytest.approx(t, abs=0.02)
    assert permutation_p(np.ones(30)) == pytest.approx(1e-5)


def test_null_differences_are_called_significant_one_time_in_twenty() -> None:
    random = np.random.default_rng(0)
    found = [permutation_p(random.normal(0, 1, 8)) <= 0.05 for _ in range(1000)]
    assert 0.03 <= np.mean(found) <= 0.065


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(("tasks", "seeds"), [(1, 6), (2, 7), (4, 8)])
def test_fewest_seeds_for_a_claim(tasks: int, seeds: int) -> None:
    assert seeds_needed(tasks) == seeds
    assert smallest_p(seeds, tasks) <= 0.05 < smallest_p(seeds - 1, tasks)
    assert permutation_p(np.arange(1.0, seeds + 1)) == smallest_p(seeds)


def test_delta_m_by_hand() -> None:
    # accuracy 0.8 -> 0.84 is +5 %, error 2.0 -> 2.2 is -10 %
    assert delta_m([0.84, 2.2], [0.8, 2.0], [True, False]) == pytest.approx(-2.5)
    assert delta_m([-0.1], [-0.2], [True]) == pytest.approx(50)  # a metric below zero that rose has improved
    assert delta_m([0.5], [0.0], [True]) is None


@pytest.mark.parametrize("given", [([0.9], [0.8, 3.0], [True, False]), ([[0.9, 2.0], [0.8, 1.0]], [0.8, 3.0], [True, False])])
def test_delta_m_takes_one_value_of_each(given: Any) -> None:
    with pytest.raises(ValueError, match="takes"):
        delta_m(*given)


def test_what_is_no_p_value() -> None:
    with pytest.raises(ValueError, match="takes p-values, from 0 to 1; found 2"):
        holm([0.1, 2])


def test_twenty_values_that_differ_by_rounding_have_an_interval() -> None:
    values = [0.9] * 10 + [math.nextafter(0.9, 1)] * 10
    found = estimate(values)
    assert found.low is not None
    assert found.low == pytest.approx(found.mean) == pytest.approx(0.9)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [[1.0, 2.0]]])
def test_what_are_no_values(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite numbers"):
        estimate(values)
    with pytest.raises(ValueError, match="finite numbers"):
        permutation_p(values)


def test_a_score_below_minus_one_counts_less_and_less_but_a_better_one_still_wins() -> None:
    scores = [1.0, 0.3, 0.0, -0.5, -1.0, -1.0001, -2.0, -35.0, -270.0, -1e6]
    counted = [bounded(score) for score in scores]
    assert counted[:5] == scores[:5]
    assert counted == sorted(counted, reverse=True)
    assert len(set(counted)) == len(counted)
    assert min(counted) > -2
    slope = (bounded(-1 + 1e-6) - bounded(-1 - 1e-6)) / 2e-6
    assert slope == pytest.approx(1, abs=1e-5)  # no kink where it begins


def test_training_and_report_take_the_same_mean_of_scores() -> None:
    tasks = tuple(mtl.Task("d", name, mtl.Regression(), name=name) for name in ("a", "b"))
    figures = {"a": {"r2": -50.0}, "b": {"r2": 0.5}}
    about = {name: {"score": "r2"} for name in figures}
    in_training, in_report = mean_score(tasks, figures), of_cell({"test": figures}, about)
    assert in_training == pytest.approx(in_report, abs=1e-7) == pytest.approx((-2 + 1 / 50 + 0.5) / 2)
    worse = mean_score(tasks, {"a": {"r2": -270.0}, "b": {"r2": 0.5}})
    assert worse is not None
    assert worse < in_training
