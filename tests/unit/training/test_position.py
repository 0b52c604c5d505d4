"""The end of a run, counted and stepped through."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from hpctrain.training.position import Interval, Position, StopAt

LIMITS = [None, 1, 3, 17, 40]


def stepped_total(stop_at: StopAt) -> tuple[int, list[Position]]:
    """Walk the run batch by batch, as slow and as plain as can be."""
    place, places = Position(), [Position()]
    while not (
        (stop_at.max_epochs is not None and place.epoch >= stop_at.max_epochs)
        or (stop_at.max_steps is not None and place.step >= stop_at.max_steps)
        or (stop_at.max_samples is not None and place.samples_seen >= stop_at.max_samples)
    ):
        batch = min(stop_at.global_batch_size, stop_at.epoch_samples - place.position)
        place = place.after(batch, stop_at.epoch_samples)
        places.append(place)
    return place.step, places


@pytest.mark.parametrize("epoch_samples", [1, 7, 12])
@pytest.mark.parametrize("global_batch_size", [1, 3, 4, 12])
def test_total_is_the_same_from_every_place(epoch_samples: int, global_batch_size: int) -> None:
    for epochs, steps, samples in itertools.product(LIMITS, repeat=3):
        if epochs is steps is samples is None:
            continue
        stop_at = StopAt(
            max_epochs=epochs,
            max_steps=steps,
            max_samples=samples,
            epoch_samples=epoch_samples,
            global_batch_size=min(global_batch_size, epoch_samples),
        )
        total, places = stepped_total(stop_at)
        last = places[-1]
        assert not dataclasses.replace(stop_at, **stop_at.further(last)).reached(last)
        assert not any(stop_at.further(place) for place in places[:-1])
        assert [stop_at.total_steps(place) for place in places] == [total] * len(places)
        assert [stop_at.end(place) for place in places] == [places[-1]] * len(places)
        assert [stop_at.reached(place) for place in places] == [False] * total + [True]


def test_an_epoch_ends_with_its_last_sample() -> None:
    place = Position(step=4, epoch=1, position=8, samples_seen=18)
    assert place.after(2, epoch_samples=10) == Position(
        step=5, epoch=2, position=0, samples_seen=20
    )
    assert place.after(1, epoch_samples=10) == Position(
        step=5, epoch=1, position=9, samples_seen=19
    )


def test_a_lowered_limit_is_reached_at_once() -> None:
    stop_at = StopAt(
        max_epochs=2, max_steps=None, max_samples=None, epoch_samples=10, global_batch_size=5
    )
    late = Position(step=9, epoch=4, position=5, samples_seen=45)
    assert stop_at.total_steps(late) == 9
    assert stop_at.reached(late)


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
    cadence = Interval(every_steps=every_steps, every_epochs=every_epochs)
    place, due = Position(), []
    for _ in range(12):  # epochs of three steps
        place = place.after(5, epoch_samples=15)
        if cadence.due(place):
            due.append(place.step)
    assert due == expected
