"""Output lengths."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlm_batch.domain.buckets import prompt_mix
from qlm_batch.domain.jobs import EngineKind
from qlm_batch.domain.snapshot import Output
from qlm_batch.scheduling.lengthbook import HISTORY, TENANTS, LengthBook
from qlm_batch.scheduling.lengths import Ages, kaplan_meier, prior

GENERATE = EngineKind.GENERATE


def test_kaplan_meier_agrees_with_a_case_worked_by_hand() -> None:
    # Ends at 1, 3, 3, 6; still running at 2 and 5. Survival: 5/6, then 5/6·2/4, then 0.
    found = kaplan_meier([1, 3, 3, 6], [1, 1, 1, 1], [2, 5])
    assert found.values.tolist() == [1, 3, 6]
    assert found.probabilities.tolist() == pytest.approx([1 / 6, 5 / 12, 5 / 12])


def test_without_running_requests_it_is_the_weighted_history() -> None:
    found = kaplan_meier([10, 20], [3, 1])
    assert found.probabilities.tolist() == pytest.approx([0.75, 0.25])
    assert found.mean == pytest.approx(12.5)
    assert found.var == pytest.approx(18.75)


def test_what_outlives_all_that_ended_is_not_forgotten() -> None:
    found = kaplan_meier([10, 10], [1, 1], [50, 50])
    assert found.mean == pytest.approx(30.0)


def test_a_cut_answer_counts_as_one_that_would_have_been_longer() -> None:
    # As above, the answers of 2 and 5 tokens cut: by weight, as what still runs.
    found = kaplan_meier([5, 1, 3, 2, 3, 6], [1] * 6, cut=[True, False, False, True, False, False])
    assert found.values.tolist() == [1, 3, 6]
    assert found.probabilities.tolist() == pytest.approx([1 / 6, 5 / 12, 5 / 12])


def test_an_answer_cut_where_another_ended_outlives_it() -> None:
    found = kaplan_meier([4, 4, 9], [1, 1, 1], cut=[True, False, False])
    assert found.probabilities.tolist() == pytest.approx([1 / 3, 2 / 3])


def test_beyond_the_longest_cut_answer_lengths_are_as_assumed() -> None:
    assumed = prior(GENERATE)
    found = kaplan_meier([256], [100], cut=[True], assumed=assumed, lean=1.0)
    beyond = assumed.values > 256
    share = assumed.probabilities[beyond] / assumed.probabilities[beyond].sum()
    assert found.values[found.values > 256].tolist() == assumed.values[beyond].tolist()
    assert found.probabilities[found.values > 256] == pytest.approx(share, rel=0.01)


def test_cut_beyond_all_that_is_assumed_as_much_again_is_expected() -> None:
    found = kaplan_meier([5000], [99], cut=[True], assumed=prior(GENERATE), lean=1.0)
    assert found.values[-1] == 10_000
    assert found.probabilities[-1] == pytest.approx(0.99)


def test_what_still_runs_is_the_longest_seen_as_before() -> None:
    found = kaplan_meier([10, 10, 30], [1, 1, 1], [50], cut=[False, False, True])
    assert found.values.tolist() == [10, 50]


def by_loops(
    lengths: list[int], weights: list[float], ages: list[int], age_weight: float, fading: float
) -> tuple[list[float], list[float]]:
    """The product-limit estimate of what was not cut, one observation after the other."""
    ended = sorted(zip(lengths, weights, strict=True), key=lambda each: each[0])
    values = sorted(set(lengths))
    mass = [0.0] * len(values)
    for length, weight in ended:
        mass[values.index(length)] += weight
    running, at_risk, risk = sorted(ages), [0.0] * len(values), 0.0
    for n in reversed(range(len(values))):
        if n < len(values) - 1:
            risk *= math.exp(-fading * (values[n + 1] - values[n]))
        while running and running[-1] >= values[n]:
            risk += age_weight * math.exp(-fading * (running.pop() - values[n]))
        risk += mass[n]
        at_risk[n] = risk
    found, chances, alive = [float(value) for value in values], [], 1.0
    for own, risk in zip(mass, at_risk, strict=True):
        share = min(1.0, own / risk)
        chances.append(alive * share)
        alive *= 1.0 - share
    if alive > 1e-12:
        found.append(float(max(values[-1], *ages)))
        chances.append(alive)
    return found, [chance / sum(chances, start=0.0) for chance in chances]


@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=60, unique=True),
    st.lists(st.integers(1, 3000), max_size=30),
    st.sampled_from([1.0, 0.3]),
    st.sampled_from([0.0, 1e-4, 0.02]),
)
def test_without_a_cut_answer_the_estimate_is_what_it_was_to_the_last_bit(
    lengths: list[int], ages: list[int], age_weight: float, fading: float
) -> None:
    weights = [0.98**n for n in range(len(lengths))]
    for cut in ((), [False] * len(lengths)):
        found = kaplan_meier(lengths, weights, ages, age_weight=age_weight, fading=fading, cut=cut)
        expected = by_loops(lengths, weights, ages, age_weight, fading)
        assert (found.values.tolist(), found.probabilities.tolist()) == expected


def test_one_minute_after_the_start_running_requests_correct_the_mean() -> None:
    rng = np.random.default_rng(3)
    truth = np.maximum(1, rng.lognormal(4.85, 1.0, 4000)).astype(int)
    reached = rng.integers(1, 400, truth.size)
    ended = truth <= reached
    naive = float(truth[ended].mean())
    found = kaplan_meier(
        truth[ended].tolist(), [1.0] * int(ended.sum()), reached[~ended].tolist()
    ).mean
    within = float(np.minimum(truth, 400).mean())
    assert naive < 0.75 * within
    assert found == pytest.approx(within, rel=0.08)


def test_in_a_steady_state_running_requests_do_not_inflate_the_mean() -> None:
    rng = np.random.default_rng(7)
    book = LengthBook()
    slots = 200
    left = rng.geometric(1 / 100, slots)
    total = left.copy()
    for _ in range(600):
        left -= 1
        done = left == 0
        book = book.seen(Output("t", int(n), 9) for n in total[done])
        fresh = rng.geometric(1 / 100, int(done.sum()))
        left[done], total[done] = fresh, fresh
    ages = (total - left).tolist()
    assert book.distribution(GENERATE, None, Ages.of(ages)).mean == pytest.approx(105, rel=0.2)


def test_a_residual_life_grows_with_age_where_lengths_are_heavy_tailed() -> None:
    lengths = prior(GENERATE)
    young, _ = lengths.residual(10)
    old, _ = lengths.residual(500)
    assert old > young


def test_the_residual_of_a_known_length_is_what_is_left() -> None:
    assert kaplan_meier([100], [1]).residual(30) == (70.0, 0.0)


def test_beyond_everything_seen_one_more_token_is_expected() -> None:
    assert kaplan_meier([100], [1]).residual(100) == (1.0, 0.0)


def test_the_largest_of_many_tends_to_the_maximum() -> None:
    coin = kaplan_meier([1, 9], [1, 1])
    assert coin.largest_of(1) == pytest.approx(5.0)
    assert coin.largest_of(2) == pytest.approx(7.0)
    assert coin.largest_of(40) == pytest.approx(9.0)


def test_a_tenant_of_its_own_kind_is_told_apart_from_the_rest() -> None:
    outputs = [Output("short", 10, 9), Output("long", 1000, 9)] * 100
    book = LengthBook().seen(outputs)
    assert book.distribution(GENERATE, "short").mean < 200
    assert book.distribution(GENERATE, "long").mean > 800
    middle = book.distribution(GENERATE, "unknown").mean
    assert middle == pytest.approx(book.distribution(GENERATE).mean)
    assert 300 < middle < 700


def test_nothing_seen_means_the_prior() -> None:
    assert LengthBook().distribution(GENERATE).mean == pytest.approx(219, rel=0.05)
    assert LengthBook().distribution(EngineKind.EMBED).mean == 0.0


def test_the_recent_outweighs_the_past() -> None:
    book = LengthBook().seen([Output("t", 1000, 9)] * 200 + [Output("t", 100, 9)] * 200)
    assert book.distribution(GENERATE, "t").mean < 300


def drawn(mean: float, count: int, rng: np.random.Generator) -> list[Output]:
    """Requests of one tenant whose lengths have this mean, and whose prompts say nothing."""
    lengths = rng.geometric(1.0 / mean, count).tolist()
    return [Output("t", n, int(rng.integers(10, 4000))) for n in lengths]


def test_steady_lengths_are_remembered_for_long() -> None:
    rng = np.random.default_rng(5)
    book, off = LengthBook(), []
    for _ in range(120):
        book = book.seen(drawn(200, 20, rng))
        off.append(abs(book.distribution(GENERATE, "t").mean - 200) / 200)
    # A memory of 50 alone would be off by a tenth.
    assert float(np.mean(off[40:])) < 0.065


def test_a_jump_of_lengths_is_followed_within_two_dozen_requests() -> None:
    rng = np.random.default_rng(6)
    book = LengthBook()
    for _ in range(50):
        book = book.seen(drawn(100, 20, rng))
    book = book.seen(drawn(400, 24, rng))
    assert book.distribution(GENERATE, "t").mean > 300


def test_a_mean_length_is_known_the_closer_the_more_is_remembered() -> None:
    rng = np.random.default_rng(7)
    few = LengthBook().seen(drawn(200, 20, rng))
    many = few.seen(drawn(200, 400, rng))
    # Of a geometric length the spread is its mean: 1/√20, and at best 1/√400.
    assert few.mean_error == pytest.approx(0.22, rel=0.4)
    assert 0.04 < many.mean_error < 0.5 * few.mean_error
    assert LengthBook().mean_error == 0.0


@given(
    st.lists(
        st.builds(
            Output,
            st.text(max_size=3),
            st.integers(0, 10**5),
            st.integers(0, 10**5),
            st.booleans(),
        ),
        max_size=400,
    )
)
def test_a_book_is_bounded_and_survives_storage(outputs: list[Output]) -> None:
    book = LengthBook().seen(outputs)
    assert len(book.overall.lengths) <= HISTORY
    assert len(book.tenants) <= TENANTS
    assert LengthBook.from_data(book.to_data()) == book


@given(
    st.lists(st.integers(0, 5000), min_size=1, max_size=60),
    st.lists(st.integers(1, 5000), max_size=60),
)
def test_an_estimate_is_a_distribution(lengths: list[int], ages: list[int]) -> None:
    found = (
        LengthBook()
        .seen(Output("t", n, 9) for n in lengths)
        .distribution(GENERATE, "t", Ages.of(ages))
    )
    assert found.probabilities.sum() == pytest.approx(1.0)
    assert (found.probabilities >= -1e-12).all()
    assert (np.diff(found.values) >= 0).all()


def test_prompts_tell_apart_what_is_made_from_different_templates() -> None:
    book = LengthBook().seen([Output("t", 40, 100), Output("t", 400, 2000)] * 200)
    answers, usual = book.answers("t"), book.distribution(GENERATE, "t").mean
    assert usual * answers.factor(prompt_mix([100])) == pytest.approx(40, rel=0.3)
    assert usual * answers.factor(prompt_mix([2000])) == pytest.approx(400, rel=0.15)
    both = answers.factor(prompt_mix([100, 2000]))
    assert usual * both == pytest.approx(220, rel=0.15)


def test_a_tenants_own_prompts_are_not_counted_twice() -> None:
    book = LengthBook().seen([Output("short", 40, 100), Output("long", 400, 2000)] * 200)
    usual = book.distribution(GENERATE, "long").mean
    assert usual * book.answers("long").factor(prompt_mix([2000])) == pytest.approx(400, rel=0.15)


def test_prompts_that_say_nothing_change_little() -> None:
    rng = np.random.default_rng(2)
    lengths, prompts = rng.geometric(1 / 200, 3000), rng.integers(1, 4000, 3000)
    book = LengthBook().seen(
        Output("t", int(n), int(p)) for n, p in zip(lengths, prompts, strict=True)
    )
    asked = prompt_mix(int(p) for p in rng.integers(1, 4000, 200))
    assert book.answers().factor(asked) == pytest.approx(1.0, abs=0.12)


def test_nothing_is_read_from_prompts_that_are_not_known() -> None:
    book = LengthBook().seen([Output("t", 40, 100), Output("t", 400, 2000)] * 50)
    assert book.answers().factor(()) == 1.0
    assert LengthBook().answers("t").factor(prompt_mix([5])) == 1.0


def test_answers_cut_at_once_tell_nothing_of_those_that_are_not() -> None:
    book = LengthBook().seen([Output("t", 1, 9, cut=True)] * 50 + [Output("t", 3, 9)])
    new = LengthBook().seen([Output("t", 3, 9)])
    for ages in ((), (5,) * 32):
        usual = book.distribution(GENERATE, "t", Ages.of(ages)).mean
        assert usual == pytest.approx(new.distribution(GENERATE, "t").mean, rel=0.15)
    assert book.unknown == pytest.approx(new.unknown)


@pytest.mark.parametrize("every", [False, True])
def test_under_the_bound_that_cut_answers_work_is_expected_as_they_were(every: bool) -> None:
    rng = np.random.default_rng(8)
    lengths = [400] * 400 if every else rng.geometric(1 / 250, 400).tolist()
    told = [Output("t", min(n, 256), 9, cut=n >= 256) for n in lengths]
    ages = Ages.of(range(5, 256, 8))
    before = LengthBook().seen(ended._replace(cut=False) for ended in told)
    now = LengthBook().seen(told)
    expected = before.distribution(GENERATE, "t", ages).capped(256).mean
    usual = now.distribution(GENERATE, "t", ages)
    assert usual.capped(256).mean == pytest.approx(expected, rel=0.02)
    assert usual.mean > 1.3 * expected


def test_a_bound_on_half_of_the_answers_does_not_shorten_the_others() -> None:
    rng = np.random.default_rng(9)
    lengths = rng.geometric(1 / 200, 400)
    most = np.where(np.arange(400) % 2, 100, 10**6)
    told = [
        Output("t", int(min(n, m)), 9, cut=bool(n >= m)) for n, m in zip(lengths, most, strict=True)
    ]
    usual = LengthBook().seen(told).distribution(GENERATE, "t").mean
    assert usual == pytest.approx(float(lengths.mean()), rel=0.15)


def test_prompts_whose_answers_were_cut_do_not_seem_to_ask_for_short_ones() -> None:
    rng = np.random.default_rng(10)
    free = [Output("t", int(n), 2000) for n in rng.geometric(1 / 200, 200)]
    cut = [Output("t", 1, 9, cut=True)] * 200
    book = LengthBook()
    for start in range(0, 200, 20):
        book = book.seen([*free[start : start + 20], *cut[start : start + 20]])
    assert book.answers("t").factor(prompt_mix([9])) == pytest.approx(1.0, abs=0.2)


def test_what_was_learned_before_cut_answers_were_told_apart_is_read() -> None:
    book = LengthBook().seen([Output("t", 40, 100), Output("u", 400, 2000)] * 50)
    data: Any = book.to_data()
    older = {
        **data,
        "overall": data["overall"][:3],
        "tenants": [columns[:4] for columns in data["tenants"]],
    }
    assert LengthBook.from_data(older) == book


def test_data_of_unknown_shape_counts_as_nothing_learned() -> None:
    assert LengthBook.from_data("nonsense") == LengthBook()
