"""What the GPUs of a node do: NVIDIA's by NVML, AMD's and Intel's by sysfs.

Source: Documentation/gpu/amdgpu/thermal.rst and Documentation/hwmon/sysfs-interface.rst of Linux:
power in microwatts, energy in microjoules, temperature in thousandths of a degree Celsius,
frequencies in hertz.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

_AMD, _INTEL = "0x1002", "0x8086"

_CARD = re.compile(r"card(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReading:
    """A device at one moment; None: it does not tell.

    Attributes:
        busy: share of the time in which it did something, 0 to 1.
        memory_bytes: in use, and all.
        watts: power.
        celsius: temperature.
        megahertz: clock of its cores.
        throttled: why it runs slower than it could, in words; empty: it does not.
        errors: of memory that could not be corrected, since the driver started.
    """

    name: str
    busy: float | None = None
    memory_bytes: tuple[int, int] | None = None
    watts: float | None = None
    celsius: float | None = None
    megahertz: float | None = None
    throttled: str = ""
    errors: int | None = None


class Devices(Protocol):
    """Devices of one maker.

    Attributes:
        source: what measures their power; empty where there are none.
    """

    source: str

    def read(self) -> Sequence[DeviceReading]:
        """Return what each does now; none where there are none."""
        ...


def find_devices(kind: str, root: Path = Path("/")) -> Devices:
    """Return the devices of this node.

    Args:
        kind: of the device that ranks train on, such as "cuda"; AMD's have that name too.
        root: of /sys.
    """
    if kind == "cpu":
        return _NoDevices()
    cards = SysfsDevices(root)
    return cards if cards.read() else NvmlDevices()


class _NoDevices:
    """What there is on a node whose ranks train on processors."""

    source = ""

    def read(self) -> Sequence[DeviceReading]:
        return ()


_REASONS = (
    ("HwThermalSlowdown", "hot"),
    ("SwThermalSlowdown", "hot"),
    ("HwPowerBrakeSlowdown", "power brake"),
    ("SwPowerCap", "power cap"),
    ("HwSlowdown", "hardware slowdown"),
)
"""NVML's reasons for lower clocks, and ours."""


class NvmlDevices:
    """NVIDIA's GPUs, where nvidia-ml-py and the driver are there; else none, and no error."""

    source = "NVML"

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []
        try:
            import pynvml
        except ImportError:
            return
        with suppress(pynvml.NVMLError, OSError):
            pynvml.nvmlInit()
            self._nvml = pynvml
            count = pynvml.nvmlDeviceGetCount()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]

    def read(self) -> Sequence[DeviceReading]:
        return [self._reading(handle) for handle in self._handles]

    def _reading(self, handle: Any) -> DeviceReading:
        nvml, ask = self._nvml, self._ask
        use = ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        memory = ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        milliwatts = ask(nvml.nvmlDeviceGetPowerUsage, handle)
        name = ask(nvml.nvmlDeviceGetName, handle)
        return DeviceReading(
            name=name.decode(errors="replace") if isinstance(name, bytes) else str(name or "GPU"),
            busy=None if use is None else use.gpu / 100,
            memory_bytes=None if memory is None else (int(memory.used), int(memory.total)),
            watts=None if milliwatts is None else milliwatts / 1000,
            celsius=ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            megahertz=ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            throttled=self._throttled(handle),
            errors=ask(
                nvml.nvmlDeviceGetTotalEccErrors,
                handle,
                nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
                nvml.NVML_VOLATILE_ECC,
            ),
        )

    def _throttled(self, handle: Any) -> str:
        bits = self._ask(self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
        found = [
            word
            for name, word in _REASONS
            if bits & getattr(self._nvml, f"nvmlClocksThrottleReason{name}", 0)
        ]
        return ", ".join(dict.fromkeys(found))

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """Return an answer; None where this device, or its driver, has none."""
        try:
            return question(*arguments)
        except self._nvml.NVMLError:
            return None


class SysfsDevices:
    """AMD's and Intel's GPUs, as their drivers show them in /sys/class/drm."""

    source = "the GPUs' driver"

    def __init__(self, root: Path = Path("/"), clock: Callable[[], float] = time.monotonic) -> None:
        """Look for them.

        Args:
            root: of /sys.
            clock: seconds; Intel's driver counts energy, which gives power over time.
        """
        self._clock = clock
        self._energy: dict[Path, tuple[float, float]] = {}
        found = []
        with suppress(OSError):
            for folder in (root / "sys/class/drm").iterdir():
                match, device = _CARD.fullmatch(folder.name), folder / "device"
                if match is not None and _text(device / "vendor") in (_AMD, _INTEL):
                    found.append((int(match[1]), folder))
        self._cards = [folder for _, folder in sorted(found)]

    def read(self) -> Sequence[DeviceReading]:
        readings = [
            self._amd(card / "device")
            if _text(card / "device/vendor") == _AMD
            else self._intel(card)
            for card in self._cards
        ]
        # A screen's adapter shows nothing of this.
        return [reading for reading in readings if reading is not None]

    def _amd(self, device: Path) -> DeviceReading | None:
        busy, total = _value(device / "gpu_busy_percent"), _value(device / "mem_info_vram_total")
        if busy is None or total is None:
            return None
        used = _value(device / "mem_info_vram_used") or 0
        sensors = _sensors(device)
        watts = _first(sensors / "power1_average", sensors / "power1_input")
        errors = re.search(r"ue: (\d+)", _text(device / "ras/umc_err_count"))
        return DeviceReading(
            name=_text(device / "product_name") or "AMD GPU",
            busy=busy / 100,
            memory_bytes=(int(used), int(total)),
            watts=_scaled(watts, 1e-6),
            celsius=_scaled(_first(sensors / "temp2_input", sensors / "temp1_input"), 1e-3),
            megahertz=_scaled(_value(sensors / "freq1_input"), 1e-6),
            errors=None if errors is None else int(errors[1]),
        )

    def _intel(self, card: Path) -> DeviceReading | None:
        device = card / "device"
        tile = device / "tile0/gt0/freq0"  # of the driver xe; i915 has the other
        sensors = _sensors(device)
        clock = _first(tile / "act_freq", card / "gt/gt0/rps_act_freq_mhz")
        watts = self._power(_first_path(sensors / "energy1_input", sensors / "energy2_input"))
        if clock is None and watts is None:
            return None
        throttle = tile / "throttle"
        reasons = sorted(
            path.name.removeprefix("reason_").replace("_", " ")
            for path in _entries(throttle)
            if path.name.startswith("reason_") and _value(path)
        )
        return DeviceReading(
            name="Intel GPU",
            watts=watts,
            celsius=_scaled(_first(sensors / "temp2_input", sensors / "temp1_input"), 1e-3),
            megahertz=clock,
            throttled=", ".join(reasons) if _value(throttle / "status") else "",
        )

    def _power(self, path: Path | None) -> float | None:
        """Return the watts since the last look at a counter of energy; None at the first one."""
        energy = None if path is None else _value(path)
        if path is None or energy is None:
            return None
        now = self._clock()
        before, self._energy[path] = self._energy.get(path), (now, energy)
        if before is None or now <= before[0] or energy < before[1]:
            return None
        return (energy - before[1]) * 1e-6 / (now - before[0])


def _sensors(device: Path) -> Path:
    """Return the folder of a device's sensors."""
    return next(iter(_entries(device / "hwmon")), device / "hwmon")


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _first_path(*paths: Path) -> Path | None:
    return next((path for path in paths if path.exists()), None)


def _first(*paths: Path) -> float | None:
    values = (_value(path) for path in paths)
    return next((value for value in values if value is not None), None)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _value(path: Path) -> float | None:
    try:
        return float(_text(path))
    except ValueError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
