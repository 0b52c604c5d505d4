"""DDP: where it wraps the model; gradients averaged, tensors broadcast, ranks compared."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from hpctrain.checkpoint.tensors import checksum, tensor_bytes
from hpctrain.config.schema import TrainingSection
from hpctrain.errors import TrainingError
from hpctrain.launch.process_group import World
from hpctrain.training.compiler import backward, compiler_unasked
from hpctrain.training.model.wrappers import Call, Method, PlainNames, UnhookedCallee, call_directly
from hpctrain.training.parallel.unused_parameters import UnusedParameters, reaching_all, unreduced
from hpctrain.utils.text import listed

_COMPRESSIONS = {
    "bf16": default_hooks.bf16_compress_hook,
    "fp16": default_hooks.fp16_compress_hook,
}


class DDPModel:
    """The model, wrapped in DistributedDataParallel where there is more than one rank.

    Attributes:
        model: the bare model.
        call: runs a method of the task on it in training; with the backward pass that follows, the
            mean of all ranks' gradients is in the parameters.
        call_alone: the same without gradients, and without the other ranks.
        spread: whether ranks hold parts of the parameters.
        parameters: those that are trained, in the order of the model.
        unused: what happens to those without a part in a step.
    """

    def __init__(
        self,
        model: nn.Module,
        world_size: int,
        device: torch.device,
        training: TrainingSection,
    ) -> None:
        """Wrap the model. Collective: all ranks.

        Args:
            model: on the device.
            world_size: number of ranks.
            device: of this rank.
            training: of the config: how DDP is to reduce gradients, and what it knows of the
                model's parameters.
        """
        self.model = model
        self.call: Call = call_directly(model)
        self.call_alone = self.call
        self.parameters = [item for item in model.parameters() if item.requires_grad]
        self._count = len(self.parameters)
        self._complex = [item for item in self.parameters if item.is_complex()]
        self._names = [name for name, item in model.named_parameters() if item.requires_grad]
        self.unused = UnusedParameters(training.unused_parameters, world_size)
        self._bucket_mb = training.bucket_mb
        self._compress_gradients = training.compress_gradients
        self._static_graph = training.static_graph
        self._ddp: DistributedDataParallel | None = None
        self._clock = _DeviceClock() if device.type == "cuda" else _HostClock()
        if world_size > 1:
            self._wrap()
        else:
            self.backward_and_reduce = backward  # type: ignore[method-assign]

    spread = False
    # Where every rank has the whole gradient there is nothing to do in a step.
    count_uses: Callable[[bool], None] | None = None
    counted: Callable[[list[torch.Tensor]], list[torch.Tensor]] | None = None
    reduce_norm: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def distributed(self) -> bool:
        return self._ddp is not None

    @property
    def communication_seconds(self) -> float:
        """How long this rank has waited for gradients after its own were there.

        On a GPU: as far as the device has come.
        """
        return self._clock.seconds()

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Return what this rank holds of every parameter, all of it, by plain names."""
        return PlainNames(self.model).of(self.model.named_parameters())

    def local(self) -> AbstractContextManager[object]:
        """Return the context of passes that only add to the gradients of this rank."""
        return nullcontext() if self._ddp is None else self._ddp.no_sync()

    def agree(self) -> None:
        """Do nothing: the others wait for gradients only, which DDP looks after."""

    def settle_graph(self) -> None:
        """Have a static graph taken for one, after a pass that reduced nothing, before others.

        Collective: all ranks. Passes with a static graph that do not reduce, before one that does,
        would leave DDP counting on gradients that never come: from then on it would average none,
        and say nothing. Source: pytorch/pytorch pull request 187732; seen in torch 2.13.
        """
        if self._static_graph and self._ddp is not None:
            self._ddp, self.call = None, self.call_alone  # its buckets go first
            self._wrap(static_graph=True)

    def clear_gradients(self) -> None:
        """Forget all gradients; DDP makes the next ones views of its buckets again."""
        for parameter in self.parameters:
            parameter.grad = None

    begin = clear_gradients
    """A step begins."""

    def backward(self, loss: torch.Tensor, seed: torch.Tensor) -> None:
        """Run backward from `loss`, (), whose own gradient is `seed`, ()."""
        backward(loss, seed)

    def backward_and_reduce(self, loss: torch.Tensor, seed: torch.Tensor) -> None:
        """Run backward from `loss` and average the gradients. Collective: all ranks.

        Raises:
            TrainingError: on this rank, if DDP still waits for a gradient of it: it has averaged
                none of that bucket.
        """
        backward(loss, seed)
        if self._ddp is not None:
            self._clock.stop()
            if missing := unreduced(self._ddp._check_reducer_finalized, self._names):
                self.unused.met(missing, len(self._names))

    def gradients(self) -> list[torch.Tensor]:
        """Return the gradients of all parameters that have one.

        Raises:
            TrainingError: if one has none, and that is not allowed.
        """
        for item in self._complex:
            if item.grad is not None and item.grad.is_conj():
                item.grad = item.grad.resolve_conj()  # optimizers take them for pairs of numbers
        found = [item.grad for item in self.parameters if item.grad is not None]
        if len(found) < self._count:
            each = zip(self._names, self.parameters, strict=True)
            self.unused.met([name for name, item in each if item.grad is None], len(self._names))
        return found

    def reaching(self, method: Method) -> Method:
        """Return a loss from which DDP's first passes come to every parameter, used or not.

        Else they would leave it waiting, where it does not look for those that are not used. A
        static graph has to be seen as it is.
        """
        plain = self._static_graph or self.unused.allowed
        return method if plain else reaching_all(method)

    def settle(self) -> None:
        """Do nothing: a pass leaves nothing behind that the next one could stumble over."""

    def refused_lost_changes(self) -> AbstractContextManager[None]:
        """Return a context that does nothing: what a pass changes is changed."""
        return nullcontext()

    def watched(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters that autograd gives gradients to."""
        return [(name, item) for name, item in self.named_parameters() if item.requires_grad]

    def refresh(self) -> None:
        """Do nothing: parameters stay where they are."""

    def time_communication(self, last: nn.Parameter) -> None:
        """Count time as communication once the gradient of `last` is there.

        Args:
            last: the parameter whose gradient comes last.
        """
        # Holds the clock only: a hook of a parameter that held the model would keep both for ever.
        start = self._clock.start
        last.register_post_accumulate_grad_hook(lambda _: start())

    def _wrap(self, *, static_graph: bool = False) -> None:
        # Without device_ids: inputs are on the device, DDP need not look for some to move.
        with compiler_unasked():
            self._ddp = DistributedDataParallel(
                UnhookedCallee(self.model),
                bucket_cap_mb=self._bucket_mb,
                gradient_as_bucket_view=True,
                static_graph=static_graph,
                find_unused_parameters=self.unused.allowed,
            )
        self.call = self._ddp
        if self._compress_gradients != "none":
            self._ddp.register_comm_hook(None, _COMPRESSIONS[self._compress_gradients])


class _HostClock:
    """Time between start and stop; gloo reduces while the host waits."""

    def __init__(self) -> None:
        self._total = 0.0
        self._started: float | None = None

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        if self._started is not None:
            self._total += time.perf_counter() - self._started
            self._started = None

    def seconds(self) -> float:
        return self._total


class _DeviceClock:
    """Time on the stream of the model between start and stop, read once the device is past it."""

    def __init__(self) -> None:
        self._total = 0.0
        self._started: torch.cuda.Event | None = None
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._spare: list[torch.cuda.Event] = []

    def start(self) -> None:
        self._started = self._record()

    def stop(self) -> None:
        if self._started is not None:
            self._running.append((self._started, self._record()))
            self._started = None
            if len(self._running) > _MOST_EVENTS:
                self._harvest()

    def seconds(self) -> float:
        self._harvest()
        return self._total

    def _record(self) -> torch.cuda.Event:
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _harvest(self) -> None:
        while self._running and self._running[0][1].query():
            begin, end = self._running.popleft()
            self._total += begin.elapsed_time(end) / 1000
            self._spare += begin, end


_MOST_EVENTS = 64


def broadcast_tensors(world: World, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return rank 0's tensors on every rank. Collective: all ranks.

    So that a checkpoint is read, and its checksums verified, once and not once per rank.

    Args:
        world: the ranks.
        tensors: by name, any shapes and dtypes; only rank 0's are looked at.

    Returns:
        The same tensors on the host, by name.
    """
    if world.topology.world_size == 1:
        assert tensors is not None
        return dict(tensors)
    headers = world.communicator.broadcast(
        [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]
        if tensors is not None
        else None
    )
    received = {}
    for name, shape, dtype in headers:
        if world.topology.is_rank_zero:
            assert tensors is not None
            tensor = tensors[name].to(world.device)
        else:
            tensor = torch.empty(shape, dtype=dtype, device=world.device)
        dist.broadcast(tensor_bytes(tensor), src=0)
        received[name] = tensor.cpu()
    return received


def broadcast_model(world: World, model: nn.Module) -> None:
    """Give every rank rank 0's parameters and buffers, as DDP does. Collective: all ranks."""
    for tensor in [*model.parameters(), *model.buffers()]:
        data = tensor_bytes(tensor.to(world.device))
        if data.numel():
            dist.broadcast(data, src=0)
            with torch.no_grad():
                tensor.copy_(data.view(tensor.dtype).view(tensor.shape))


def broadcast_buffers(world: World, model: nn.Module) -> None:
    """Give every rank rank 0's buffers, by their names. Collective: all ranks.

    A rank that has not run the model yet may lack some, or have them in another shape.
    """
    facts = [(name, item.shape, item.dtype) for name, item in model.named_buffers()]
    for name, shape, dtype in world.communicator.broadcast(facts):
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        buffer = module._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (shape, dtype):
            buffer = torch.empty(shape, dtype=dtype, device=world.device)
        data = tensor_bytes(buffer)
        if data.numel():
            dist.broadcast(data, src=0)
        module._buffers[key] = data.view(dtype).view(shape)


def take_buffers_of_rank_zero(modules: Iterable[nn.Module], rank: int) -> None:
    """Have every rank's buffers be rank 0's, all in one message. Collective: all ranks.

    Args:
        modules: of a model that ranks have run alike, so that they have the same buffers.
        rank: this one.
    """
    # Looked up by name: a forward pass may have put others in their place.
    unique = {id(item): item for module in modules for item in module._buffers.values()}
    buffers = [item for item in unique.values() if item is not None and item.numel()]
    if not buffers:
        return
    pieces = [tensor_bytes(item) for item in buffers]
    whole = torch.cat(pieces)
    dist.broadcast(whole, src=0)
    if rank:
        received = whole.split([piece.numel() for piece in pieces])
        with torch.no_grad():
            for buffer, piece in zip(buffers, received, strict=True):
                # A copy begins where any dtype may begin.
                buffer.copy_(piece.clone().view(buffer.dtype).view(buffer.shape))


_SHOWN = 4


def check_equal_shapes(model: nn.Module, world: World) -> None:
    """Compare names, shapes and types of parameters and buffers. Collective: all ranks.

    Raises:
        TrainingError: on every rank, naming the first that differs.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    mine = [(name, f"{tuple(item.shape)} {item.dtype}") for name, item in named]
    digest = hashlib.blake2b(repr(mine).encode(), digest_size=16).hexdigest()
    digests = world.communicator.all_gather(digest)
    if len(set(digests)) == 1:
        return
    everyone = world.communicator.all_gather(mine)
    usual = everyone[digests.index(max(digests, key=digests.count))]
    rank, theirs = next((rank, item) for rank, item in enumerate(everyone) if item != usual)
    here, there = dict(usual), dict(theirs)
    name = next(name for name in {**here, **there} if here.get(name) != there.get(name))
    raise TrainingError(
        f"the model is another one on rank {rank}: {name} is {there.get(name, 'not in it')}, "
        f"and {here.get(name, 'not in it')} on other ranks. Build it from its arguments alone, "
        "not from the rank, the host or an unseeded draw",
        everywhere=True,
    )


def check_equal_parameters(model: nn.Module, world: World, step: int) -> None:
    """Compare the parameters of all ranks, bit for bit. Collective: all ranks.

    Reads all parameters once on the device and sends one hash; names only where they differ.

    Args:
        model: the bare model.
        world: the ranks.
        step: for the message.

    Raises:
        TrainingError: on every rank, naming parameters and ranks.
    """
    if world.topology.world_size == 1:
        return
    names = [name for name, _ in model.named_parameters()]
    sums = torch.stack([checksum(item.detach()) for item in model.parameters()]).tolist()
    digest = hashlib.blake2b(repr(sums).encode(), digest_size=16).hexdigest()
    digests = world.communicator.all_gather(digest)
    if len(set(digests)) == 1:
        return
    everyone = world.communicator.all_gather(sums)
    # What most ranks hold is taken for right; among equals the lowest rank's.
    right = everyone[digests.index(max(digests, key=digests.count))]
    wrong = [rank for rank, theirs in enumerate(everyone) if theirs != right]
    differing = [
        name
        for index, name in enumerate(names)
        if any(everyone[rank][index] != right[index] for rank in wrong)
    ]
    shown = listed(differing, _SHOWN)
    raise TrainingError(
        f"step {step}: parameters differ between ranks: {shown} ({len(differing)} of "
        f"{len(names)}) on rank {', '.join(map(str, wrong))} of {len(everyone)} is not what the "
        "others have. Something changes them outside of the step, or a device computes wrongly: "
        "go on from the last checkpoint, without that host if it happens there again",
        everywhere=True,
    )
