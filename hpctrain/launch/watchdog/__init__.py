"""One small process per node that sees what the ranks cannot say: death, and standing still.

A rank that is killed has no last words, and one that is stopped or holds the GIL answers nobody.
So the lowest rank of every node starts a watchdog beside it: a process in a session of its own,
which no launcher kills together with the ranks, without torch, MPI or a GIL that others hold. The
watchdog of rank 0's node, the coordinator, hears from all others and decides; see `judge`.

The ranks pay nothing for it in a step but one integer in shared memory.
"""
