"""Judges the trial steps: does model, optimizer and batch fit, and what does a step cost?"""

from __future__ import annotations

from collections.abc import Sequence

from hpctrain.preflight.finding import Finding
from hpctrain.preflight.probes.numbers import NumberFacts
from hpctrain.preflight.probes.step import StepFacts
from hpctrain.utils.text import metric, number, percent, plural, size

_LEAST_FREE = 0.1
"""Of the memory: what batches, evaluation and fragmentation may still take."""

STEP_FIX = "the same happens in training: start one process on a small config to see its traceback"
MEMORY_FIX = (
    'lower data.micro_batch_size, or set training.precision = "bf16-mixed"; data.buffer_mb is the '
    "host memory for reading ahead"
)


def step_fix(message: str) -> str:
    """Return what to do about a step that failed."""
    words = ("out of memory", "outofmemory", "can't allocate memory", "memoryerror")
    return MEMORY_FIX if any(word in message.lower() for word in words) else STEP_FIX


def judge_step(steps: Sequence[StepFacts]) -> Finding:
    """Tell model and time of a step."""
    first = steps[0]
    seconds = max(step.seconds for step in steps)
    fact = (
        f"{plural(first.parameters, 'parameter')} ({size(first.parameter_bytes)}); a step takes "
        f"{number(seconds * 1000)} ms: per rank {plural(first.samples, 'sample')} in "
        f"{plural(first.passes, 'pass', 'passes')}"
    )
    values = {
        "parameters": first.parameters,
        "checkpoint_bytes": first.checkpoint_bytes,
        "seconds": [step.seconds for step in steps],
    }
    bad = [rank for rank, step in enumerate(steps) if not step.finite]
    if bad:
        return Finding(
            name="step",
            status="warn",
            fact=f"{fact}; on synthetic data loss or gradient is not finite (rank {bad[0]})",
            fix="of numbers from 0 to 1 that is a surprise: look for logarithms, divisions, and "
            "the scale of the initial weights",
            values=values,
        )
    return Finding(name="step", status="pass", fact=fact, values=values)


def judge_numbers(facts: Sequence[NumberFacts], hosts: Sequence[str]) -> Finding:
    """Tell what a step on real data and real rows of an evaluation have led to."""
    bad = [(rank, each.trouble) for rank, each in enumerate(facts) if each.trouble]
    values = {
        "loss": [each.loss for each in facts],
        "grad_norm": [each.grad_norm for each in facts],
        "ranks": [rank for rank, _ in bad],
    }
    if bad:
        rank, trouble = bad[0]
        more = f" (and {len(bad) - 1} more of {len(facts)})" if bad[1:] else ""
        return Finding(
            name="numbers",
            status="fail",
            fact=f"rank {rank} on {hosts[rank]}{more}: {trouble}",
            fix="mend the data or mask what is missing there; where the data are right, look for "
            "logarithms, divisions and the scale of initial weights and of data.normalize",
            values=values,
        )
    stepped = [each for each in facts if each.samples]
    samples = sum(each.samples for each in stepped)
    loss = sum(each.loss * each.samples for each in stepped) / max(1, samples)
    fact = f"the first batch has the loss {metric(loss)}; gradients and metrics are finite"
    return Finding(name="numbers", status="pass", fact=fact, values=values)


def judge_memory(
    steps: Sequence[StepFacts], hosts: Sequence[str], node_ranks: Sequence[int], device: str
) -> Finding:
    """Hold what the ranks took against what there is.

    Args:
        steps: of every rank.
        hosts: of every rank.
        node_ranks: of every rank.
        device: "cpu": the ranks of a node share its memory; else each has a device of its own.
    """
    worst: tuple[float, Finding] | None = None
    for place, step in enumerate(steps):
        node = [each for each, n in zip(steps, node_ranks, strict=True) if n == node_ranks[place]]
        shared = device == "cpu"
        used = sum(each.used_bytes for each in node) if shared else step.used_bytes
        # Ranks of a node do not look at the same moment: the least is the most careful.
        free = min(each.free_bytes for each in node) if shared else step.free_bytes
        total = step.total_bytes
        whose = plural(len(node), "rank") if shared else f"rank {place}"
        fact = f"{size(used)} by {whose} of {hosts[place]}; {size(free)} of {size(total)} are left"
        tight = free < _LEAST_FREE * total
        finding = Finding(
            name="memory",
            status="warn" if tight else "pass",
            fact=f"{fact} ({percent(free, total)})" if tight else fact,
            fix=MEMORY_FIX if tight else "",
            values={"used_bytes": used, "free_bytes": free, "total_bytes": total},
        )
        if worst is None or free / total < worst[0]:
            worst = free / total, finding
    assert worst is not None
    return worst[1]


def judge_pinned_memory(
    steps: Sequence[StepFacts], hosts: Sequence[str], node_ranks: Sequence[int], free_bytes: int
) -> Finding:
    """Hold the host memory that devices copy from and to against what a node has.

    Args:
        steps: of every rank.
        hosts: of every rank.
        node_ranks: of every rank.
        free_bytes: of a node, the least of all.
    """
    taken: dict[int, int] = {}
    for step, node in zip(steps, node_ranks, strict=True):
        taken[node] = taken.get(node, 0) + step.pinned_bytes
    worst = max(taken, key=lambda node: taken[node])
    host = hosts[list(node_ranks).index(worst)]
    fact = (
        f"reading ahead and saves pin up to {size(taken[worst])} of the host's memory on {host}; "
        f"{size(free_bytes)} are free"
    )
    tight = taken[worst] > (1 - _LEAST_FREE) * free_bytes
    return Finding(
        name="host memory",
        status="warn" if tight else "pass",
        fact=fact,
        fix="lower data.buffer_mb, start fewer ranks per node, or ask for more memory: pinned "
        "memory is never swapped"
        if tight
        else "",
        values={"pinned_bytes": taken[worst], "free_bytes": free_bytes},
    )
