"""Which window each lane of a rank is at, as positions advance: pure arithmetic."""

from __future__ import annotations

import numpy as np

from hpctrain.data.order.partition import lanes_of_rank
from hpctrain.data.order.permutation import Int64s
from hpctrain.data.order.shuffle import Epoch, Runs

LANES_PER_SPARE = 4
"""One slot in addition for so many lanes: as many may go on to another window at once."""


def count_slots(lanes: int) -> int:
    """Return how many windows of a rank's lanes are at hand at the same time."""
    return lanes + -(-lanes // LANES_PER_SPARE)


class LaneWindows:
    """Keeps the windows of a rank's lanes in slots, and finds samples in them.

    A lane that goes on to its next window gets another slot for it, and gives its own back once
    all of the old window is served. So the lanes of many batches go on in one go, which is read in
    one go.
    """

    def __init__(self, epoch: Epoch, rank: int, world_size: int) -> None:
        order = epoch.order
        lanes = lanes_of_rank(rank, world_size, order.lanes)
        slots = count_slots(len(lanes))
        self._epoch = epoch
        self._num_lanes = order.lanes
        self._first_lane, self._lane_step = lanes.start, lanes.step
        # Of each lane: its slot, and the first position that is not in it any more.
        self._slots = np.full(len(lanes), -1, np.int64)
        self._ends = np.full(len(lanes), -1, np.int64)
        # The same of the window after that, where the last call took one.
        self._next_slots = np.full(len(lanes), -1, np.int64)
        self._next_ends = np.full(len(lanes), -1, np.int64)
        self._free = list(range(slots))
        # Of each slot: the row of the lane that it begins with, and the order of its rows.
        self._starts = np.zeros(slots, np.int64)
        self._order = np.zeros((slots, order.longest_window_rows), np.int64)

    def advance(self, ahead: Int64s) -> tuple[Runs | None, int]:
        """Take new windows for as many of the positions ahead as there are slots for.

        Args:
            ahead: (count,) int64, the rank's next positions, at least one; those before are
                served.

        Returns:
            What the new windows hold, `owners` being slots, None if there are none; and how many
            of the positions can be found now, at least one.
        """
        self._give_back()
        # The rank's lanes come in turn: so many positions ask each lane once.
        firsts = ahead[: len(self._slots)]
        turns = (len(ahead) - 1 - np.arange(len(firsts))) // len(self._slots)
        lasts = ahead[np.arange(len(firsts)) + turns * len(self._slots)]
        indices = self._indices(firsts % self._num_lanes)
        due = np.flatnonzero(self._ends[indices] <= lasts)
        if not len(due):
            return None, len(ahead)
        begins = np.maximum(self._ends[indices[due]], firsts[due])
        soonest = np.argsort(begins, kind="stable")
        begins, indices = begins[soonest], indices[due[soonest]]
        runs, taken, stop = self._take(indices, begins)
        if taken < len(begins):
            stop = min(stop, int(begins[taken]))
        return runs, int(np.searchsorted(ahead, stop))

    def find(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """Return the slot and the place in its window, for positions found by `advance`."""
        lane_rows, lanes = np.divmod(positions, self._num_lanes)
        indices = self._indices(lanes)
        slots = np.where(
            positions < self._ends[indices], self._slots[indices], self._next_slots[indices]
        )
        return slots, self._order[slots, lane_rows - self._starts[slots]]

    def rows_at(self, positions: Int64s) -> Int64s:
        """Return which rows of the dataset are at ascending positions, in calls that ascend."""
        rows = np.empty(len(positions), np.int64)
        done = 0
        while done < len(positions):
            _, count = self.advance(positions[done:])
            part = positions[done : done + count]
            slots, places = self.find(part)
            rows[done : done + count] = self._epoch.unshuffled_rows(
                part % self._num_lanes, self._starts[slots] + places
            )
            done += count
        return rows

    def _give_back(self) -> None:
        """Let go of the windows that were served to their end."""
        over = np.flatnonzero(self._next_slots >= 0)
        self._free += [slot for slot in self._slots[over].tolist() if slot >= 0]
        self._slots[over], self._ends[over] = self._next_slots[over], self._next_ends[over]
        self._next_slots[over] = -1

    def _take(self, indices: Int64s, begins: Int64s) -> tuple[Runs, int, int]:
        """Take the windows that serve lanes from these ascending positions on.

        No window is taken that would begin at or behind the end of another one of these: that end
        is as far as this call can go, so in the next one all that were taken here are in use.

        Returns:
            What they hold; for how many of the lanes; the first position that none of them serves.
        """
        indices, begins = indices[: len(self._free)], begins[: len(self._free)]
        lane_rows, lanes = np.divmod(begins, self._num_lanes)
        windows, runs = self._epoch.windows(lanes, lane_rows)
        ends = windows.stops * self._num_lanes + lanes
        soonest = np.minimum.accumulate(ends)
        taken = 1 + int((begins[1:] < soonest[:-1]).sum())
        slots = np.array([self._free.pop() for _ in range(taken)], np.int64)
        self._starts[slots] = windows.starts[:taken]
        self._order[slots, : windows.order.shape[1]] = windows.order[:taken]
        self._next_slots[indices[:taken]] = slots
        self._next_ends[indices[:taken]] = ends[:taken]
        runs = Runs(*(each[runs.owners < taken] for each in runs))
        return runs._replace(owners=slots[runs.owners]), taken, int(soonest[taken - 1])

    def _indices(self, lanes: Int64s) -> Int64s:
        return (lanes - self._first_lane) // self._lane_step
