"""What is learned from observations."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from qlm_batch.domain.snapshot import Observation, Output, Profile
from qlm_batch.scheduling.profile import ANY_MODEL, Knowledge, fold
from qlm_batch.scheduling.speed import Speed, StepTime, prior_step_time

TRUE = StepTime(base=9.8e-3, per_sequence=4e-5, per_kv=5e-7, per_prefill=6.3e-5)


def steps(
    count: int, truth: StepTime = TRUE, *, seed: int = 1, noise: float = 0.02
) -> list[tuple[int, int, int, float]]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        sequences = int(rng.integers(1, 200))
        kv = sequences * int(rng.integers(50, 800))
        prefill = int(rng.integers(0, 2048)) if rng.random() < 0.5 else 0
        seconds = truth.seconds(sequences, kv, prefill) * float(rng.normal(1.0, noise))
        rows.append((sequences, kv, prefill, seconds))
    return rows


def close(found: StepTime, truth: StepTime, rel: float) -> None:
    assert found.base == pytest.approx(truth.base, rel=rel)
    assert found.per_sequence == pytest.approx(truth.per_sequence, rel=3 * rel)
    assert found.per_kv == pytest.approx(truth.per_kv, rel=rel)
    assert found.per_prefill == pytest.approx(truth.per_prefill, rel=rel)


def test_least_squares_recovers_the_coefficients_from_a_wrong_prior() -> None:
    speed = Speed(prior_step_time("tiny", "cpu")).after_steps(steps(2000))
    close(speed.step_time(), TRUE, rel=0.1)


def test_folding_in_pieces_is_the_same_as_folding_at_once() -> None:
    rows = steps(10, noise=0.0)
    start = Speed(TRUE)
    pieces = start
    for row in rows:
        pieces = pieces.after_steps([row])
    assert pieces.gram == pytest.approx(start.after_steps(rows).gram)


def test_forgetting_follows_a_device_that_changed() -> None:
    slower = StepTime(20e-3, 8e-5, 1e-6, 1.2e-4)
    speed = Speed(TRUE).after_steps(steps(3000)).after_steps(steps(5000, slower, seed=2))
    close(speed.step_time(), slower, rel=0.15)


def test_what_was_never_excited_stays_at_the_prior() -> None:
    start = prior_step_time("llama-7b", "A100")
    rows = [(32, 8000, 0, 0.02)] * 200
    assert Speed(start).after_steps(rows).step_time().per_prefill == start.per_prefill


def test_short_prompts_and_small_batches_are_learned_too() -> None:
    true = StepTime(12e-3, 1.2e-3, 1e-6, 9e-4)
    rng = np.random.default_rng(4)
    rows = [
        (n, 60 * n, p, true.seconds(n, 60 * n, p) * float(rng.uniform(0.95, 1.05)))
        for n, p in zip(
            rng.integers(1, 17, 500).tolist(), rng.choice([0, 0, 30, 60], 500).tolist(), strict=True
        )
    ]
    found = Speed(prior_step_time("compute", "cpu")).after_steps(rows).step_time()
    assert found.per_prefill == pytest.approx(true.per_prefill, rel=0.1)
    assert found.seconds(8, 480, 30) == pytest.approx(true.seconds(8, 480, 30), rel=0.03)


def test_one_compilation_does_not_bend_the_fit() -> None:
    speed = Speed(TRUE).after_steps(steps(1000)).after_steps([(32, 8000, 0, 60.0)])
    assert speed.step_time().seconds(32, 8000, 0) < 2 * TRUE.seconds(32, 8000, 0)


def test_no_coefficient_is_ever_negative() -> None:
    rows = [(100, 1000, 0, 0.001), (1, 10, 0, 0.1)] * 50
    found = Speed(TRUE).after_steps(rows).step_time()
    assert min(found.base, found.per_sequence, found.per_kv, found.per_prefill) >= 0.0


@pytest.mark.parametrize("device", ["NVIDIA A100-SXM4-80GB", "NVIDIA H200", "cpu", "unheard of"])
def test_every_pair_has_a_prior(device: str) -> None:
    assert prior_step_time("whatever", device).seconds(32, 8000, 100) > 0.0


def test_a_bigger_model_is_expected_to_be_slower() -> None:
    small, big = (prior_step_time(f"llama-{n}b", "NVIDIA A100") for n in (7, 70))
    assert big.seconds(32, 8000, 0) > 2 * small.seconds(32, 8000, 0)


def test_an_a100_is_not_taken_for_an_a10() -> None:
    a100, a10 = (prior_step_time("llama-7b", device) for device in ("A100", "A10"))
    assert a10.base > 2 * a100.base


def test_efficiency_is_what_an_engine_loses_between_its_steps() -> None:
    rows = [(32, 8000, 0, TRUE.seconds(32, 8000, 0))] * 100
    speed = Speed(TRUE).after_steps(steps(1000))
    busy_s = 2 * sum(row[3] for row in rows)
    for _ in range(200):
        speed = speed.after_busy(3200, 32, busy_s, rows)
    assert speed.efficiency == pytest.approx(0.5, rel=0.1)


def test_what_an_engine_loses_is_known_after_a_few_seconds() -> None:
    rows = [(32, 8000, 0, TRUE.seconds(32, 8000, 0))] * 10
    step_s = rows[0][3]
    speed = Speed(TRUE).after_steps(steps(1000))
    for _ in range(10):
        speed = speed.after_busy(320, 3, 0.5, rows)
    lost = 1.0 - 10 * step_s / 0.5
    assert 0.75 * lost < 1.0 - speed.efficiency <= lost


def test_folding_keeps_what_it_does_not_touch() -> None:
    first = fold((), [Observation("i", "A100", "m", 1.0, (Output("t", 50, 9),), tuple(steps(5)))])
    second = fold(first, [Observation("j", "A100", "n", 2.0, (Output("t", 60, 9),))])
    assert all(profile in second for profile in first if profile.model != ANY_MODEL)
    assert fold(second, ()) == second


def test_what_was_learned_survives_storage() -> None:
    seen = Observation("i", "A100", "m", 1.0, (Output("t", 50, 9),), tuple(steps(50)), 500, 10, 3.0)
    profiles = fold((), [seen])
    stored = [Profile(p.model, p.device, json.loads(json.dumps(dict(p.data)))) for p in profiles]
    assert Knowledge.of(stored) == Knowledge.of(profiles)
    assert Knowledge.of(stored).speed("m", "A100").fitted


def test_what_is_read_already_is_not_read_again() -> None:
    profiles = fold(
        (), [Observation("i", "A100", "m", 1.0, (Output("t", 50, 9),), tuple(steps(50)))]
    )
    first = Knowledge.of(profiles)
    again = Knowledge.of([replace(profile) for profile in profiles], first)
    assert again == first
    assert again.book("m") is first.book("m")
    assert again.speed("m", "A100") is first.speed("m", "A100")
    after = first.observed([Observation("i", "A100", "m", 2.0, (Output("t", 60, 9),))])
    assert Knowledge.of(after.profiles(), first) == Knowledge.of(after.profiles())


def test_lengths_are_shared_by_devices_and_speeds_are_not() -> None:
    known = Knowledge.of(
        fold((), [Observation("i", "A100", "m", 1.0, (Output("t", 50, 9),), tuple(steps(50)))])
    )
    assert known.book("m").overall.lengths == (50,)
    assert not known.speed("m", "H100").fitted
