"""A model whose parameters are spread over all ranks: each holds some rows of every tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from hpctrain.checkpoint.tensors import tensor_bytes
from hpctrain.config.schema import TrainingSection
from hpctrain.errors import ConfigError
from hpctrain.launch.process_group import World
from hpctrain.training.step.call import Call, Callee, Method
from hpctrain.training.step.gathering import GatherOrder
from hpctrain.training.step.lost_changes import refused_lost_changes
from hpctrain.training.step.plain_names import PlainNames
from hpctrain.training.step.precision import NumberFormat
from hpctrain.training.step.sharding import find_units
from hpctrain.training.step.trial import Findings
from hpctrain.training.step.unit_format import unit_policy
from hpctrain.training.step.unused import UnusedParameters, Uses
from hpctrain.training.step.whole import WholeParameters, common_dtype


class Shards:
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
        callee = Callee(model)
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
        self._uses.begin()
        # Looked up by name: a forward pass may have put others in their place.
        unique = {id(item): item for module in self._modules for item in module._buffers.values()}
        buffers = [item for item in unique.values() if item is not None and item.numel()]
        if not buffers:
            return
        pieces = [tensor_bytes(item) for item in buffers]
        whole = torch.cat(pieces)  # all in one message
        dist.broadcast(whole, src=0)
        if self.rank:
            received = whole.split([piece.numel() for piece in pieces])
            with torch.no_grad():
                for buffer, piece in zip(buffers, received, strict=True):
                    # A copy begins where any dtype may begin.
                    buffer.copy_(piece.clone().view(buffer.dtype).view(buffer.shape))

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
        torch.autograd.backward(loss, seed)

    def backward_and_reduce(self, loss: Tensor, seed: Tensor) -> None:
        """Run backward from `loss` and average the gradients. Collective: all ranks."""
        torch.autograd.backward(loss, seed)
        self._whole.reduce()

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
        for unit in self._units:
            unit.reshard()
        self._order.agree()

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
        """Look for the rows where torch keeps them after its first pass. Collective: all ranks."""
        for name, spread in self._spread.items():
            self._rows[name].data = spread.to_local().detach()
        self._uses.watch(self.watched())

    def time_communication(self, last: nn.Parameter) -> None:
        """Count nothing, see `communication_seconds`."""
