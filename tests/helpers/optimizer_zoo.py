"""Optimizers in the manner of those that people bring, with every kind of state."""

from __future__ import annotations

import math
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

Closure = Callable[[], float] | None


class Plain(Optimizer):
    """Signs of gradients; others say what they keep."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            factor = self.learn(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    size = self.update(self.state[parameter], parameter)
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"] * factor * size)

    def learn(self, group: dict[str, Any]) -> float:
        return 1.0

    def update(self, state: dict[str, Any], parameter: Tensor) -> float:
        return 1.0


class Lion(Plain):
    elementwise = True

    @torch.no_grad()
    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                average = state["exp_avg"]
                parameter.add_(average.lerp(parameter.grad, 0.1).sign_(), alpha=-group["lr"])
                average.lerp_(parameter.grad, 0.01)


class ListState(Plain):
    """As SOAP and Shampoo: lists of matrices, some of them in another order in memory."""

    def update(self, state: dict[str, Any], parameter: Tensor) -> float:
        gradient = parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = 0
            state["GG"] = [torch.eye(size) for size in gradient.shape]
            state["Q"] = None
        state["step"] += 1
        for dimension, matrix in enumerate(state["GG"]):
            others = [index for index in range(gradient.ndim) if index != dimension]
            matrix.lerp_(torch.tensordot(gradient, gradient, dims=(others, others)), 0.1)
        # Eigenvectors come column after column, and products with them round by that.
        state["Q"] = [torch.linalg.eigh(matrix)[1] for matrix in state["GG"]]
        rotated = gradient
        for matrix in state["Q"]:
            rotated = torch.tensordot(rotated, matrix, dims=([0], [0]))
        return float(rotated.abs().mean()) / (1 - 0.9 ** state["step"])


class GroupState(Plain):
    """As Prodigy and D-Adaptation: what was learned is in the groups."""

    def __init__(self, params: Any, lr: float = 1.0, d0: float = 1e-3) -> None:
        Optimizer.__init__(self, params, {"lr": lr, "d": d0, "k": 0, "history": [None, (0, 1.5)]})

    def learn(self, group: dict[str, Any]) -> float:
        group["k"] += 1
        group["d"] *= 1.6
        group["d_hat"] = group["d"] / 3
        group["history"][0] = (group["k"], math.inf)
        return float(group["d"]) + group["d_hat"]


class ArgumentState(Plain):
    """Changes what it was given: the argument is the first value of what it learns."""

    def __init__(self, params: Any, lr: float = 1.0, d: float = 1e-3, nu: Any = (1, 2)) -> None:
        Optimizer.__init__(self, params, {"lr": lr, "d": d, "nu": nu})

    def learn(self, group: dict[str, Any]) -> float:
        group["d"] *= 1.6
        return float(group["d"])


class TensorGroups(Plain):
    """Keeps tensors in its groups."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        defaults = {"lr": lr, "d": torch.tensor(1e-3, dtype=torch.float64)}
        Optimizer.__init__(self, params, {**defaults, "moments": (torch.zeros(3), 1)})

    def learn(self, group: dict[str, Any]) -> float:
        group["d"].mul_(1.3)
        group["moments"] = (group["moments"][0] + group["d"].float(), group["moments"][1] + 1)
        return float(group["d"] + group["moments"][0].sum())


class OldRAdam(Plain):
    """As the first RAdam: a table in its groups that is filled as it goes."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        table = [[None, None] for _ in range(3)]
        Optimizer.__init__(self, params, {"lr": lr, "buffer": table})

    def update(self, state: dict[str, Any], parameter: Tensor) -> float:
        state["step"] = state.get("step", 0) + 1
        (group,) = self.param_groups
        cell = group["buffer"][state["step"] % 3]
        if cell[0] != state["step"]:
            cell[:] = [state["step"], 1 / state["step"]]
        return float(cell[1])


class OtherKeys(Plain):
    """Keeps what belongs to no parameter in its state."""

    def update(self, state: dict[str, Any], parameter: Tensor) -> float:
        shared: dict[Any, Any] = self.state  # type: ignore[assignment]
        shared["count"] = shared.get("count", 0) + 1
        shared.setdefault(("norm", 2), deque(maxlen=3)).append(parameter.grad.norm())  # type: ignore[union-attr]
        shared.setdefault(7, torch.zeros(2)).add_(0.1)
        return float(sum(shared["norm", 2])) + float(shared[7].sum()) / shared["count"]


class Nested(Plain):
    """Every kind of container and number."""

    def update(self, state: dict[str, Any], parameter: Tensor) -> float:
        if not state:
            state["flags"] = {"warm": False, "name": "none", "nothing": None}
            state["seen"] = defaultdict(int)
            state["named"] = OrderedDict(b=torch.zeros(2, dtype=torch.bfloat16), a=(1, 2.5))
            state["history"] = deque([torch.zeros_like(parameter)], maxlen=2)
            state["z"] = 1 + 2j
            state["set"] = {1, 2}
            state["numpy"] = np.float32(0.1)
            state["array"] = np.arange(3.0)
            state["kind"] = (torch.float32, torch.Size((1, 2)), b"bytes")
            state["a/b"] = torch.ones(1)
            state[3] = 0.1
            state["big"] = 2**80
            state["step"] = torch.tensor(0.0)
        state["flags"]["warm"] = not state["flags"]["warm"]
        state["seen"][state["flags"]["warm"]] += 1
        state["named"]["b"] += 0.25
        state["history"].append(parameter.grad.clone())  # type: ignore[union-attr]
        state["numpy"] = state["numpy"] * np.float32(1.1)
        state["array"] = state["array"] * 1.1
        state[3] *= 1.1
        state["a/b"] *= 1.01
        state["step"] += 1
        moved = sum(float(item.abs().mean()) for item in state["history"])
        return moved + float(state["numpy"]) * float(state["array"].sum()) + state[3]


class LikeAdafactor(Plain):
    """Rows and columns of second moments, and a Python float that it goes on from."""

    def update(self, state: dict[str, Any], parameter: Tensor) -> float:
        gradient = parameter.grad
        assert gradient is not None
        if not state:
            state["step"], state["RMS"] = 0, 0
            if parameter.ndim > 1:
                state["row"], state["col"] = gradient[..., 0] * 0, gradient[0] * 0
            else:
                state["sq"] = torch.zeros_like(gradient)
        state["step"] += 1
        state["RMS"] = float(parameter.square().mean().sqrt())
        decay = 1 - state["step"] ** -0.8
        if "sq" in state:
            state["sq"].lerp_(gradient.square(), 1 - decay)
            return float(state["sq"].mean()) + state["RMS"]
        state["row"].lerp_(gradient.square().mean(-1), 1 - decay)
        state["col"].lerp_(gradient.square().mean(0), 1 - decay)
        return float(state["row"].mean() * state["col"].mean()) + state["RMS"]


class LAMB(Plain):
    """A ratio of norms for each tensor."""

    def update(self, state: dict[str, Any], parameter: Tensor) -> float:
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg"].lerp_(parameter.grad, 0.1)  # type: ignore[arg-type]
        return float(parameter.norm() / (state["exp_avg"].norm() + 1e-3)) / 10


class Late(Plain):
    """A slot that is there from the second step only."""

    def update(self, state: dict[str, Any], parameter: Tensor) -> float:
        if "step" in state:
            state.setdefault("slow", torch.zeros_like(parameter)).lerp_(parameter, 0.5)
        state["step"] = state.get("step", 0) + 1
        return 1.0 + (float(state["slow"].mean()) if "slow" in state else 0.0)


ALL = (
    *(Plain, Lion, ListState, GroupState, ArgumentState, TensorGroups, OldRAdam, OtherKeys),
    *(Nested, LikeAdafactor, LAMB, Late),
)


class SAM(Plain):
    """Wants to evaluate the model twice."""

    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        assert closure is not None, "SAM requires closure"


class Counts(Plain):
    """Keeps what it learns in an attribute."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.steps = 0

    def learn(self, group: dict[str, Any]) -> float:
        self.steps += 1
        return 1 / self.steps


class Wraps(Plain):
    """Hands its work on to an optimizer inside, whose state is its own."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.base = torch.optim.Adam([item for g in self.param_groups for item in g["params"]], lr)

    def step(self, closure: Closure = None) -> None:  # type: ignore[override]
        self.base.step()


class History:
    """Foreign to any file."""


class Foreign(Plain):
    def update(self, state: dict[str, Any], parameter: Tensor) -> float:
        state["history"] = History()
        return 1.0


class ForeignGroup(Plain):
    def learn(self, group: dict[str, Any]) -> float:
        group["history"] = History()
        return 1.0


class Alias(Plain):
    """Keeps the very parameter."""

    def update(self, state: dict[str, Any], parameter: Tensor) -> float:
        state["same"] = parameter
        return 1.0


class OwnFactory(Plain):
    def update(self, state: dict[str, Any], parameter: Tensor) -> float:
        state["seen"] = defaultdict(lambda: 0)
        return 1.0


class Draws(Plain):
    """Rounds by a generator of its own."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.generator = torch.Generator().manual_seed(0)

    def update(self, state: dict[str, Any], parameter: Tensor) -> float:
        return float(torch.rand((), generator=self.generator))


class DrawsInPython(Plain):
    """Decides by a generator of Python's."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.random = random.Random(0)

    def learn(self, group: dict[str, Any]) -> float:
        return self.random.random()


class DrawsFromAll(Plain):
    """Rounds by the generator that everybody draws from."""

    def update(self, state: dict[str, Any], parameter: Tensor) -> float:
        return float(np.random.random())  # noqa: NPY002


class SetsItsRate(Plain):
    """Takes the learning rate that it is given for its own to change."""

    def learn(self, group: dict[str, Any]) -> float:
        group["lr"] *= 1.01
        return 1.0


class SecondSet(Plain):
    """As schedule-free ones: other weights to evaluate with, found by rounding to and fro."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        Optimizer.__init__(self, params, {"lr": lr, "train_mode": False})

    def update(self, state: dict[str, Any], parameter: Tensor) -> float:
        assert self.param_groups[0]["train_mode"]
        state.setdefault("z", parameter.clone()).sub_(parameter.grad, alpha=0.1)  # type: ignore[arg-type]
        return 1.0

    @torch.no_grad()
    def eval(self) -> None:
        self._move(to=False, weight=1 - 1 / 0.9)

    @torch.no_grad()
    def train(self) -> None:
        self._move(to=True, weight=1 - 0.9)

    def _move(self, *, to: bool, weight: float) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["train_mode"] != to and "z" in self.state[parameter]:
                    parameter.lerp_(self.state[parameter]["z"], weight)
            group["train_mode"] = to


class ChangesItsState(SecondSet):
    """Its state is another one after an evaluation, too."""

    def _move(self, *, to: bool, weight: float) -> None:
        super()._move(to=to, weight=weight)
        for state in self.state.values():
            if "z" in state:
                state["z"].mul_(1.001)
