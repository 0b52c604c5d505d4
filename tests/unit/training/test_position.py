"""The end of a run, counted and stepped through."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from hpctrain.training.position import Cadence, Horizon, Place

LIMITS = [None, 1, 3, 17, 40]


def stepped_total(horizon: Horizon) -> tuple[int, list[Place]]:
    """Walk the run batch by batch, as slow and as plain as can be."""
    place, places = Place(), [Place()]
    while not (
        (horizon.max_epochs is not None and place.epoch >= horizon.max_epochs)
        or (horizon.max_steps is not None and place.step >= horizon.max_steps)
        or (horizon.max_samples is not None and place.samples_seen >= horizon.max_samples)
    ):
        batch = min(horizon.global_batch_size, horizon.epoch_samples - place.position)
        place = place.after(batch, horizon.epoch_samples)
        places.append(place)
    return place.step, places


@pytest.mark.parametrize("epoch_samples", [1, 7, 12])
@pytest.mark.parametrize("global_batch_size", [1, 3, 4, 12])
def test_total_is_the_same_from_every_place(epoch_samples: int, global_batch_size: int) -> None:
    for epochs, steps, samples in itertools.product(LIMITS, repeat=3):
        if epochs is steps is samples is None:
            continue
        horizon = Horizon(
            max_epochs=epochs,
            max_steps=steps,
            max_samples=samples,
            epoch_samples=epoch_samples,
            global_batch_size=min(global_batch_size, epoch_samples),
        )
        total, places = stepped_total(horizon)
        last = places[-1]
        assert not dataclasses.replace(horizon, **horizon.further(last)).reached(last)
        assert not any(horizon.further(place) for place in places[:-1])
        assert [horizon.total_steps(place) for place in places] == [total] * len(places)
        assert [horizon.end(place) for place in places] == [places[-1]] * len(places)
        assert [horizon.reached(place) for place in places] == [False] * total + [True]


def test_an_epoch_ends_with_its_last_sample() -> None:
    place = Place(step=4, epoch=1, position=8, samples_seen=18)
    assert place.after(2, epoch_samples=10) == Place(step=5, epoch=2, position=0, samples_seen=20)
    assert place.after(1, epoch_samples=10) == Place(step=5, epoch=1, position=9, samples_seen=19)


def test_a_lowered_limit_is_reached_at_once() -> None:
    horizon = Horizon(
        max_epochs=2, max_steps=None, max_samples=None, epoch_samples=10, global_batch_size=5
    )
    late = Place(step=9, epoch=4, position=5, samples_seen=45)
    assert horizon.total_steps(late) == 9
    assert horizon.reached(late)


@pytest.mark.parametrize(
    ("every_steps", "every_epochs", "expected"),
    [
        (0, 0, []),
        (4, 0, [4, 8, 12]),
        (0, 1, [3, 6, 9, 12]),
        (0, 2, [6, 12]),
        (4, 2, [4, 6, 8, 12]),
    ],
)
def test_cadence(every_steps: int, every_epochs: int, expected: list[int]) -> None:
    cadence = Cadence(every_steps=every_steps, every_epochs=every_epochs)
    place, due = Place(), []
    for _ in range(12):  # epochs of three steps
        place = place.after(5, epoch_samples=15)
        if cadence.due(place):
            due.append(place.step)
    assert due == expected
