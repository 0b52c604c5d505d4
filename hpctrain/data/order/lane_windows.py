"""Which window each lane of a rank is at, as positions advance: pure arithmetic."""

from __future__ import annotations

import numpy as np

from hpctrain.data.order.partition import lanes_of_rank
from hpctrain.data.order.permutation import Int64s
from hpctrain.data.order.shuffle import Epoch, Runs

LANES_PER_SPARE = 4
"""One slot in addition for so many lanes: as many may go on to another window at once."""
_NEVER = np.iinfo(np.int64).max


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
        # The same of the window after that, where it is there already.
        self._next_slots = np.full(len(lanes), -1, np.int64)
        self._next_ends = np.full(len(lanes), _NEVER, np.int64)
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
        self._give_back(int(ahead[0]))
        # The rank's lanes come in turn: so many positions ask each lane once.
        firsts = ahead[: len(self._slots)]
        turns = (len(ahead) - 1 - np.arange(len(firsts))) // len(self._slots)
        lasts = ahead[np.arange(len(firsts)) + turns * len(self._slots)]
        indices = self._indices(firsts % self._num_lanes)
        due = np.flatnonzero((self._ends[indices] <= lasts) & (self._next_slots[indices] < 0))
        begins = np.maximum(self._ends[indices[due]], firsts[due])
        soonest = np.argsort(begins, kind="stable")
        taken, left = np.split(soonest, [len(self._free)])
        runs = self._take(indices[due[taken]], begins[taken]) if len(taken) else None
        stop = int(self._next_ends.min())
        if len(left):
            stop = min(stop, int(begins[left[0]]))
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

    def _give_back(self, position: int) -> None:
        """Let go of the windows that end before this position of the stream."""
        # A lane is asked for the position where its window ends, or for a later one.
        over = np.flatnonzero((self._next_slots >= 0) & (self._ends <= position))
        self._free += [slot for slot in self._slots[over].tolist() if slot >= 0]
        self._slots[over], self._ends[over] = self._next_slots[over], self._next_ends[over]
        self._next_slots[over], self._next_ends[over] = -1, _NEVER

    def _take(self, indices: Int64s, begins: Int64s) -> Runs:
        """Take the windows that serve lanes from these positions on."""
        lane_rows, lanes = np.divmod(begins, self._num_lanes)
        windows, runs = self._epoch.windows(lanes, lane_rows)
        slots = np.array([self._free.pop() for _ in indices], np.int64)
        self._starts[slots] = windows.starts
        self._order[slots, : windows.order.shape[1]] = windows.order
        self._next_slots[indices] = slots
        self._next_ends[indices] = windows.stops * self._num_lanes + lanes
        return runs._replace(owners=slots[runs.owners])

    def _indices(self, lanes: Int64s) -> Int64s:
        return (lanes - self._first_lane) // self._lane_step
