"""torch's compiler stays out until something asks for it, and then finds all as it would have."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hpctrain.training.compiler import as_written, backward, leave_out_compiler

WITHOUT_AND_WITH = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from hpctrain.training.compiler import as_written, backward, compiler_unasked, leave_out_compiler

def is_loaded():
    return "torch._dynamo" in sys.modules

def stepped(step_of):
    torch.manual_seed(0)
    net = DistributedDataParallel(torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss = net(torch.ones(4, 3)).square().sum()
        backward(loss, torch.full_like(loss, 2))
        step_of(optimizer)()
    optimizer.load_state_dict(optimizer.state_dict())
    assert not [value for value in net.parameters() if value.grad is None]
    return [value.detach() for value in net.parameters()]

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
leave_out_compiler()
leave_out_compiler()
with compiler_unasked():
    DistributedDataParallel(torch.nn.Linear(3, 2))
assert "_dynamo" not in vars(torch)
with as_written(), compiler_unasked():
    without = stepped(lambda optimizer: optimizer.step)
assert not is_loaded() and "sympy" not in sys.modules
marked = torch.optim.Optimizer.zero_grad.__wrapped__
late = vars(marked)["__dynamo_disable"]

with compiler_unasked():
    assert torch._dynamo.utils.counters is not None  # what DDP does not ask for
assert is_loaded() and torch._dynamo is sys.modules["torch._dynamo"]
calls = []

def backend(graph, inputs):
    calls.append(graph)
    return graph.forward

compiled = stepped(lambda optimizer: torch.compile(optimizer.step, backend=backend))
assert calls
assert vars(marked)["__dynamo_disable"] is not late
for one, other in zip(without, compiled, strict=True):
    torch.testing.assert_close(one, other)  # Adam computes with tensors in graphs
dist.destroy_process_group()
"""


def test_optimizers_and_ddp_do_without_and_are_what_they_were_with_it() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_AND_WITH],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_what_is_compiled_in_a_trial_runs_as_it_is_written() -> None:
    """Also by the first that compiles, while the trial is on."""
    compilations = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        compilations.append(graph)
        return graph.forward

    leave_out_compiler()
    net = nn.Linear(3, 2)
    with as_written():
        compiled = torch.compile(net, backend=backend)
        assert torch.equal(compiled(torch.ones(3)), net(torch.ones(3)))
        assert not compilations
    compiled(torch.ones(3))
    assert len(compilations) == 1


def test_a_backward_pass_is_torchs() -> None:
    """Also where something watches calls, and for a loss that has none."""
    passes = [torch.autograd.backward, backward]
    gradients = []
    for run in passes:
        x = torch.arange(6.0).requires_grad_()
        run(x.square().sum().sqrt(), torch.tensor(0.3))
        gradients.append(x.grad)
        with pytest.raises(RuntimeError, match="does not require grad"):
            run(torch.tensor(1.0), torch.tensor(1.0))
    assert torch.equal(*gradients)

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[object] = []
    loss = torch.ones((), requires_grad=True) * 2
    with Watch():
        backward(loss, torch.tensor(1.0))
    assert torch.autograd.backward in seen
