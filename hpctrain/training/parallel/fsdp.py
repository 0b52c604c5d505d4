"""FSDP: where it shards the model; each rank holds some rows of every parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase

from hpctrain.config.schema import TrainingSection
from hpctrain.errors import ConfigError, TrainingError
from hpctrain.launch.process_group import World
from hpctrain.topology import Communicator
from hpctrain.training.compiler import backward
from hpctrain.training.model.precision import NumberFormat
from hpctrain.training.model.wrappers import Call, Callee, Method, PlainNames
from hpctrain.training.parallel.ddp import take_buffers_of_rank_zero
from hpctrain.training.parallel.fsdp_units import (
    Findings,
    WholeParameters,
    common_dtype,
    find_units,
)
from hpctrain.training.parallel.unused_parameters import UnusedParameters, Uses
from hpctrain.utils.text import listed


class ShardedModel:
    """The model under FSDP2: gathered unit by unit for a pass, its gradients scattered after it.

    The optimizer works on plain tensors, the rows of this rank, that share their memory with what
    torch gathers: its kernels need to know nothing of the other ranks.

    Attributes:
        model: the bare model.
        call: runs a method of the task on it, in which it has all of its parameters that are in no
            unit; a unit has its own while its forward pass runs. Collective: all ranks.
        call_alone: the same, which here needs all ranks as well.
        parameters: this rank's rows of those that are trained, in the order of the model; empty
            where a tensor has fewer rows than there are ranks.
        unused: what happens to those without a part in a step.
        shapes: of all whole parameters that are spread, by name, the same on all ranks; numbers
            without dimensions are not, and every rank has them.
        world_size: the ranks that hold the rows.
        rank: this one.
        tied: further names of parameters, and the names that they are held under.
        offloaded: whether the rows are in host memory.
        root: what gathers: called with a method of the model's and its arguments.
    """

    distributed = True
    spread = True
    communication_seconds = 0.0  # it hides behind the arithmetic: what is left is part of that

    def __init__(
        self,
        model: nn.Module,
        section: TrainingSection,
        number_format: NumberFormat,
        world: World,
        findings: Findings = Findings(),  # noqa: B008 - it cannot be changed
    ) -> None:
        """Spread the parameters. Collective: all ranks.

        Args:
            model: in the dtype of `number_format`, the same on all ranks; on the host or the
                device, to which it goes unit by unit. Changed in place.
            section: of the config.
            number_format: of parameters and arithmetic.
            world: more than one rank.
            findings: of a trial of the model.

        Raises:
            ConfigError: if the model cannot be spread as the config says.
        """
        self.model = model
        # The root of what is gathered, so that any method of the model finds its parameters.
        self.root = callee = Callee(model)
        self.world_size, self.rank = world.topology.world_size, world.topology.rank
        self.unused = UnusedParameters(section.unused_parameters, self.world_size)
        self.offloaded = section.cpu_offload
        self._device = world.device
        self._whole = WholeParameters(model, world.device, self.world_size, findings.moved)
        if self._whole.named and self.offloaded and world.device.type != "cpu":
            raise ConfigError(
                f"training.cpu_offload: the parameter {next(iter(self._whole.named))} cannot be "
                "spread: it is a number without dimensions, complex, of another dtype than most, "
                "or changed by forward passes. Leave cpu_offload out, or use ddp"
            )
        if not self.rank:
            self._whole.report()
        self._plain = plain = PlainNames(model)
        self.shapes = {
            plain(name): tuple(item.shape)
            for name, item in model.named_parameters()
            if name not in self._whole.named
        }
        names = {item: name for name, item in model.named_parameters()}
        self.tied = {
            plain(name): plain(names[item])
            for name, item in model.named_parameters(remove_duplicate=False)
            if names[item] != name
        }
        units = [
            model.get_submodule(name) for name in find_units(model, section.shard, findings.unfit)
        ]
        if section.compile:
            # Gathering in between cannot be compiled; a unit by itself can.
            for unit in units or [model]:
                unit.compile(mode=section.compile_mode)
        group = dist.group.WORLD
        assert group is not None
        mesh = DeviceMesh.from_group(group, world.device.type)
        pin = world.device.type != "cpu"
        offload = CPUOffloadPolicy(pin_memory=pin) if self.offloaded else OffloadPolicy()
        whole = set(self._whole.named.values())
        options: dict[str, Any] = {"ignored_params": whole} if whole else {}
        common = common_dtype(model)
        if findings.moved:  # a teacher follows the parameters, not what is left of them in bfloat16
            number_format = replace(number_format, autocast=None)
        # From the inside out, as torch wants it; the model itself takes what is left.
        for unit in [*reversed(units), callee]:
            fully_shard(
                unit,
                mesh=mesh,
                reshard_after_forward=section.reshard_after_forward and unit is not callee,
                mp_policy=unit_policy(unit, units, number_format, common),
                offload_policy=offload,
                **options,
            )
        self._units = [item for item in callee.modules() if isinstance(item, FSDPModule)]
        self._root = self._units[0]
        self._spread = {
            name: item for name, item in model.named_parameters() if isinstance(item, DTensor)
        }
        self._rows = {
            name: nn.Parameter(item.to_local().detach(), requires_grad=item.requires_grad)
            if isinstance(item, DTensor)
            else item
            for name, item in model.named_parameters()
        }
        self.parameters = [item for item in self._rows.values() if item.requires_grad]
        # What only some ranks have a gradient of is reduced as well; torch before 2.13 would mix.
        if hasattr(self._root, "set_reduce_scatter_unused_params"):
            self._root.set_reduce_scatter_unused_params(True)
        trained = [name for name, item in self._rows.items() if item.requires_grad]
        self._uses = Uses(trained, world.device)
        self._order = GatherOrder(self._root, world.communicator)
        self.call: Call = self._order.watched(callee)
        self.call_alone: Call = self.call
        self._modules = list(model.modules())

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Return this rank's rows of every parameter, by plain names."""
        return self._plain.of(self._rows.items())

    def begin(self) -> None:
        """Forget all gradients, and take rank 0's buffers, as DDP does. Collective: all ranks."""
        self.clear_gradients()
        self.count_uses_anew()
        take_buffers_of_rank_zero(self._modules, self.rank)

    @contextmanager
    def local(self) -> Iterator[None]:
        """Keep the gradients of the passes in the body whole, on this rank."""
        self._root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._root.set_requires_gradient_sync(True)

    def clear_gradients(self) -> None:
        """Forget all gradients."""
        for name, spread in self._spread.items():
            spread.grad = self._rows[name].grad = None
        self._whole.clear_gradients()

    def backward(self, loss: Tensor, seed: Tensor) -> None:
        """Run backward from `loss`, (), whose own gradient is `seed`, (). Collective: all ranks."""
        backward(loss, seed)

    def backward_and_reduce(self, loss: Tensor, seed: Tensor) -> None:
        """Run backward from `loss` and average the gradients. Collective: all ranks."""
        backward(loss, seed)
        self._whole.reduce()

    def reduce_whole(self) -> None:
        """Average the gradients of what every rank has. Collective: all ranks."""
        self._whole.reduce()

    def whole_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that every rank has all of."""
        return list(self._whole.named.values())

    def gradients(self) -> list[Tensor]:
        """Return this rank's rows of all gradients, where the optimizer finds them.

        Collective: all ranks, where parameters without a part in a step are allowed.

        Raises:
            TrainingError: on this rank, if a parameter has none, and that is not allowed.
        """
        missing = self._uses.missing_everywhere() if self.unused.allowed else self._uses.missing()
        if missing:
            self.unused.met(missing, len(self.parameters))
            for name in missing:
                self.model.get_parameter(name).grad = None
        found = []
        for name, spread in self._spread.items():
            if spread.requires_grad and isinstance(spread.grad, DTensor):
                local = self._rows[name].grad = spread.grad.to_local()
                found.append(local)
        whole = [item.grad for item in self._whole.named.values() if item.grad is not None]
        self._uncounted = len(whole) if self.rank else 0
        return found + whole

    def counted(self, gradients: list[Tensor]) -> list[Tensor]:
        """Return those of the gradients that no lower rank has as well."""
        return gradients[: len(gradients) - self._uncounted]

    def reduce_norm(self, norm: Tensor) -> Tensor:
        """Return the norm of the whole gradient from that of these rows, (). Collective."""
        # Squared in float64: a norm above 1e19 is no overflow yet.
        square = norm.double().square().to(self._device)
        dist.all_reduce(square)
        return square.sqrt().to(norm.device, norm.dtype)

    def reaching(self, method: Method) -> Method:
        """Return the method as it is: FSDP waits for no gradient."""
        return method

    def settle(self) -> None:
        """Let go of gathered parameters; to be called after passes without a backward one.

        Collective: all ranks.

        Raises:
            TrainingError: on every rank, if they called different units in the first evaluation.
        """
        self.release()
        self._order.agree()

    def release(self) -> None:
        """Let go of gathered parameters, so that the next pass gathers what they are by then."""
        for unit in self._units:
            unit.reshard()

    def agree(self) -> None:
        """Compare which units the ranks have called. Collective: all ranks.

        Raises:
            TrainingError: on every rank, if these are not the same.
        """
        self._order.agree()

    def refused_lost_changes(self) -> AbstractContextManager[None]:
        """Return the context of a pass that must not change what is gathered."""
        return refused_lost_changes(self.model, self._units, list(self._whole.named))

    def count_uses(self, counts: bool) -> None:
        """Say whether the backward passes that follow are of samples."""
        self._uses.counting = counts

    def count_uses_anew(self) -> None:
        """Forget which parameters backward passes have come to: an update follows of others."""
        self._uses.begin()

    def watched(self) -> list[tuple[str, nn.Parameter]]:
        """Return the whole parameters, for hooks of autograd. Collective: all ranks."""
        found: list[tuple[str, nn.Parameter]] = []
        for unit in self._units:
            unit.unshard()
            found += [
                (name, item)
                for name, item in self.model.named_parameters()
                if not isinstance(item, DTensor) and item.requires_grad
            ]
            unit.reshard()
        return found + [(name, p) for name, p in self._whole.named.items() if p.requires_grad]

    def settle_graph(self) -> None:
        """Do nothing: FSDP looks at no graph."""

    def refresh(self) -> None:
        """Look for the rows where torch keeps them after its first pass. Collective: all ranks.

        Gradients are lost.
        """
        self.find_rows()
        self._uses.watch(self.watched())

    def find_rows(self) -> None:
        """Look for the rows where torch keeps them after its first pass, gradients and all."""
        for name, spread in self._spread.items():
            self._rows[name].data = spread.to_local().detach()

    def time_communication(self, last: nn.Parameter) -> None:
        """Count nothing, see `communication_seconds`."""


def unit_policy(
    unit: nn.Module, units: Sequence[nn.Module], number_format: NumberFormat, dtype: torch.dtype
) -> MixedPrecisionPolicy:
    """Return in which formats a unit is gathered, and its gradients are summed.

    Args:
        unit: the module.
        units: all of them.
        number_format: of the arithmetic.
        dtype: of the parameters that are spread.
    """
    inner = {
        id(module)
        for other in units
        if other is not unit
        for module in other.modules()
        if not any(module_inside is unit for module_inside in other.modules())
    }
    own = [module for module in unit.modules() if id(module) not in inner]
    # Batch norms mix their weights with running statistics, which stay as they are.
    mixes = any(isinstance(module, _NormBase) for module in own)
    narrow = None if mixes or dtype != torch.float32 else number_format.autocast
    return MixedPrecisionPolicy(
        param_dtype=narrow,
        reduce_dtype=torch.float64 if dtype == torch.float64 else torch.float32,
        cast_forward_inputs=False,
    )


class GatherOrder:
    """Compares the units of every pass with those of the first one, on this rank.

    Ranks that skip different units would gather rows of one with rows of the other, and say
    nothing of it where these have the same shape. Costs a comparison of two short lists a pass:
    FSDP notes the order for itself.
    """

    def __init__(self, root: FSDPModule, communicator: Communicator) -> None:
        """Begin without a pass.

        Args:
            root: what gathers the units.
            communicator: of all ranks.
        """
        # Has the list from the first pass on. Source: torch.distributed.fsdp of torch 2.13,
        # FSDPParamGroup._record_post_forward.
        self._context: Any = root._get_fsdp_state()._comm_ctx
        self._communicator = communicator
        # With gradients, and without: an evaluation may call other modules.
        self._orders: dict[bool, list[Any]] = {}
        self._agreed: set[bool] = set()

    def watched(self, call: Call) -> Call:
        """Return a call whose passes are looked at.

        Its TrainingError, on this rank, names the units that were skipped.
        """

        def watched(method: Method, fields: Any) -> Any:
            first = len(getattr(self._context, "post_forward_order", ()))
            result = call(method, fields)
            order = self._context.post_forward_order[first:]
            trains = torch.is_grad_enabled()
            if not (trains or any(_names(order))):
                return result  # an evaluation may do without the model, as on outputs it has kept
            expected = self._orders.setdefault(trains, order)
            if order != expected:
                raise TrainingError(_difference(_names(expected), _names(order)))
            return result

        return watched

    def agree(self) -> None:
        """Compare the order of first passes over the ranks, once. Collective: all ranks.

        Raises:
            TrainingError: on every rank, naming the units that one of them has skipped.
        """
        for kind in sorted(self._orders.keys() - self._agreed):
            self._agreed.add(kind)
            orders = self._communicator.all_gather(_names(self._orders[kind]))
            longest = max(orders, key=len)
            for rank, order in enumerate(orders):
                if order != longest:
                    what = _difference(longest, order)
                    raise TrainingError(f"rank {rank}: {what}", everywhere=True)


def _names(groups: Sequence[Any]) -> list[str]:
    return [str(group._module_fqn).removeprefix("module.") for group in groups]


def _difference(expected: Sequence[str], order: Sequence[str]) -> str:
    skipped = [name for name in expected if name not in order]
    if skipped:
        what = f"{listed(skipped)} {'was' if len(skipped) == 1 else 'were'} not called in this pass"
    else:
        pairs = zip(expected, order, strict=False)
        before, now = next(
            (pair for pair in pairs if pair[0] != pair[1]), (f"{len(expected)} calls", len(order))
        )
        what = f"units were called in another order in this pass: {now} in place of {before}"
    return (
        f'training.strategy = "fsdp": {what}. Every rank has to call every unit in every pass, as '
        "they gather its parameters together: gather it with a module around it, by naming that in "
        "training.shard"
    )


Gathered = list[tuple[str, Tensor, Tensor]]
"""Name, parameter, and what its values were."""


@contextmanager
def refused_lost_changes(
    model: nn.Module, units: Sequence[nn.Module], whole: Sequence[str]
) -> Iterator[None]:
    """Watch the forward passes in the body, and refuse changes that would be lost.

    Args:
        model: whose parameters.
        units: that are gathered.
        whole: names of parameters that every rank has.

    Raises:
        TrainingError: on this rank, after the body, naming the parameters.
    """
    before: dict[nn.Module, Gathered] = {}
    changed: dict[str, None] = {}

    def enter(unit: nn.Module, *_: Any) -> None:
        before[unit] = [
            (name, item, item.detach().clone())
            for name, item in model.named_parameters()
            if not hasattr(item, "to_local") and name not in whole
        ]

    def leave(unit: nn.Module, *_: Any) -> None:
        for name, item, value in before.pop(unit, []):
            if not torch.equal(item.detach(), value):
                changed[name] = None

    # After FSDP's own that gathers, and before the one that lets go.
    hooks = [unit.register_forward_pre_hook(enter) for unit in units]
    hooks += [unit.register_forward_hook(leave, prepend=True) for unit in units]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if changed:
        raise TrainingError(
            f"the forward pass changes the parameters {listed(list(changed))}, and with "
            'training.strategy = "fsdp" it has copies of them, so that this would be lost. Set it '
            'to "ddp", or change them by functions of torch, which a trial of the model sees'
        )
