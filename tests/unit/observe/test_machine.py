"""Figures of nodes, devices and ranks: read, written within bounds, and who is slow by them."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from hpctrain.launch.watchdog.client import NUM_NOTES, Pulse
from hpctrain.observe.job_record import job_times, node_hours, timestamp
from hpctrain.observe.machine import devices, recorder
from hpctrain.observe.machine import log as machine_log
from hpctrain.observe.machine.counters import Reading, job_group, read_counters
from hpctrain.observe.machine.devices import DeviceReading, NvmlDevices, SysfsDevices, find_devices
from hpctrain.observe.machine.log import (
    MOST_RANKS,
    WEEK_BYTES,
    Allowance,
    MachineLog,
    energy_between,
    energy_line,
    file_of,
    is_recorded,
    read_hosts,
    signs_of_life,
)
from hpctrain.observe.machine.recorder import (
    RankFigures,
    Recorder,
    device_facts,
    node_facts,
    rank_facts,
)
from hpctrain.observe.machine.stragglers import stragglers
from hpctrain.observe.records import to_line
from hpctrain.watch.run_files import energy_of_run

WEEK = 7 * 86_400


def tree(root: Path, files: dict[str, object]) -> Path:
    """Make files below a root."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n", encoding="utf-8")
    return root


def test_this_machine_is_read() -> None:
    """Work shows as work, and bytes over the loopback as none of a device."""
    before = read_counters()
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    after = read_counters()
    assert after.cores == len(os.sched_getaffinity(0)) or after.cores > 0
    assert before.busy_seconds is not None
    assert after.busy_seconds is not None
    assert after.busy_seconds > before.busy_seconds
    assert after.memory_bytes is not None
    total, used = after.memory_bytes
    assert 0 < used < total
    assert "lo" not in after.network_bytes


CGROUPS = {
    2: (
        "0::/system.slice/job_12/step_0/task_0",
        "30 1 0:1 / {root}/cg rw - cgroup2 cgroup rw",
        {
            "cpu.stat": "usage_usec 5000000\nnr_throttled 2\nthrottled_usec 250000",
            "memory.current": 5_000_000,
            "memory.max": 8_000_000,
            "memory.stat": "anon 1\ninactive_file 1000000",
        },
    ),
    1: (
        "4:memory,cpu,cpuacct:/slurm/uid_0/job_12/step_0/task_0",
        "30 1 0:1 / {root}/cg rw - cgroup cgroup rw,memory,cpu,cpuacct",
        {
            "cpuacct.usage": 5_000_000_000,
            "cpu.stat": "nr_throttled 2\nthrottled_time 250000000",
            "memory.usage_in_bytes": 5_000_000,
            "memory.limit_in_bytes": 8_000_000,
            "memory.stat": "total_inactive_file 1000000",
        },
    ),
}


@pytest.mark.parametrize("version", [1, 2])
def test_a_job_is_read_from_the_group_above_those_of_its_ranks(
    tmp_path: Path, version: int
) -> None:
    own, mount, files = CGROUPS[version]
    group = own.rpartition(":")[2].strip("/")
    job = group.partition("/step_0")[0]
    tree(
        tmp_path,
        {
            "proc/self/cgroup": own,
            "proc/self/mountinfo": mount.format(root=tmp_path),
            **{f"cg/{job}/{name}": content for name, content in files.items()},
            f"cg/{group}/memory.current": 1,
        },
    )
    assert job_group("" if version == 2 else "memory", tmp_path / "proc") == tmp_path / "cg" / job
    found = read_counters(tmp_path)
    assert (found.job_seconds, found.throttled_seconds) == (5.0, 0.25)
    assert (found.job_bytes, found.job_limit_bytes) == (4_000_000, 8_000_000)


def test_disks_and_networks_that_are_devices_count(tmp_path: Path) -> None:
    """InfiniBand counts words of four bytes, Slingshot adds the time; a bond stands on others."""
    disk = "   8   0 {} 10 0 {} 0 20 0 {} 0 0 0 0"
    tree(
        tmp_path,
        {
            "proc/diskstats": "\n".join(
                [disk.format("sda", 8, 16), disk.format("loop0", 9, 9), disk.format("dm-0", 8, 16)]
            ),
            "sys/block/sda/device/model": "x",
            "sys/block/dm-0/size": 1,
            "sys/class/net/eth0/device/vendor": "x",
            "sys/class/net/eth0/statistics/rx_bytes": 100,
            "sys/class/net/eth0/statistics/tx_bytes": 200,
            "sys/class/net/bond0/statistics/rx_bytes": 100,
            "sys/class/net/bond0/statistics/tx_bytes": 200,
            "sys/class/infiniband/mlx5_0/ports/1/counters/port_rcv_data": 25,
            "sys/class/infiniband/mlx5_0/ports/1/counters/port_xmit_data": 50,
            "sys/class/infiniband/mlx5_1/ports/1/counters/port_rcv_data": "N/A (no PMA)",
            "sys/class/cxi/cxi0/device/telemetry/hni_sts_rx_ok_octets": "7@1700000000.1",
            "sys/class/cxi/cxi0/device/telemetry/hni_sts_tx_ok_octets": "9@1700000000.1",
        },
    )
    found = read_counters(tmp_path)
    assert found.disk_bytes == (8 * 512, 16 * 512)
    assert found.network_bytes == {"cxi0": (7, 9), "eth0": (100, 200), "mlx5_0/1": (100, 200)}


def test_a_machine_that_shows_nothing_has_no_figures(tmp_path: Path) -> None:
    first = read_counters(tmp_path)
    assert (first.cores, first.busy_seconds, first.memory_bytes) == (0, None, None)
    assert node_facts([first, read_counters(tmp_path)]).keys() == {"seconds"}
    assert device_facts([(), ()]) == {}


def test_gpus_of_amd_and_intel_are_read_from_sysfs(tmp_path: Path) -> None:
    amd, xe, screen = (f"sys/class/drm/card{index}/device/" for index in (1, 0, 2))
    tree(
        tmp_path,
        {
            amd + "vendor": "0x1002",
            amd + "gpu_busy_percent": 75,
            amd + "mem_info_vram_total": 64_000_000_000,
            amd + "mem_info_vram_used": 16_000_000_000,
            amd + "hwmon/hwmon3/power1_average": 300_000_000,
            amd + "hwmon/hwmon3/temp1_input": 41_000,
            amd + "hwmon/hwmon3/temp2_input": 55_000,
            amd + "hwmon/hwmon3/freq1_input": 1_700_000_000,
            amd + "ras/umc_err_count": "ue: 3\nce: 9",
            xe + "vendor": "0x8086",
            xe + "tile0/gt0/freq0/act_freq": 1500,
            xe + "tile0/gt0/freq0/throttle/status": 1,
            xe + "tile0/gt0/freq0/throttle/reason_thermal": 1,
            xe + "tile0/gt0/freq0/throttle/reason_pl1": 0,
            xe + "hwmon/hwmon1/energy1_input": 1_000_000,
            screen + "vendor": "0x8086",
        },
    )
    now = [0.0]
    gpus = SysfsDevices(tmp_path, lambda: now[0])
    gpus.read()
    now[0] = 2.0
    tree(tmp_path, {xe + "hwmon/hwmon1/energy1_input": 401_000_000})
    intel, radeon = gpus.read()
    assert (intel.watts, intel.megahertz, intel.throttled) == (200, 1500, "thermal")
    assert radeon == DeviceReading(
        name="AMD GPU",
        busy=0.75,
        memory_bytes=(16_000_000_000, 64_000_000_000),
        watts=pytest.approx(300),
        celsius=pytest.approx(55),
        megahertz=pytest.approx(1700),
        errors=3,
    )


RAPL = "sys/class/powercap/intel-rapl"


def test_energy_of_packages_and_their_memory(tmp_path: Path) -> None:
    """Not of cores, which a package holds, nor of what is shown twice; counters begin anew."""
    zones = {
        f"{RAPL}:0/name": "package-0",
        f"{RAPL}:0/energy_uj": 900_000_000,
        f"{RAPL}:0/max_energy_range_uj": 1_000_000_000,
        f"{RAPL}:0:0/name": "core",
        f"{RAPL}:0:0/energy_uj": 5,
        f"{RAPL}:0:1/name": "dram",
        f"{RAPL}:0:1/energy_uj": 1_000_000,
        f"{RAPL}-mmio:0/name": "package-0",
        f"{RAPL}-mmio:0/energy_uj": 900_000_000,
    }
    first = read_counters(tree(tmp_path, zones))
    later = {f"{RAPL}:0/energy_uj": 100_000_000, f"{RAPL}:0:1/energy_uj": 3_000_000}
    last = read_counters(tree(tmp_path, later))
    assert node_facts([first, last])["joules"] == {"cpu": 202.0}


def test_energy_of_a_cray_is_that_of_the_whole_node(tmp_path: Path) -> None:
    energy = "sys/cray/pm_counters/energy"
    first = read_counters(tree(tmp_path, {energy: "1000 J 1700000000 us", f"{RAPL}:0/name": "x"}))
    last = read_counters(tree(tmp_path, {energy: "31000 J 1700000060 us"}))
    assert node_facts([first, last])["joules"] == {"node": 30_000.0}


def machine_line(moment: float, **more: object) -> dict[str, Any]:
    return {"kind": "machine", "step": 1, "seconds": 60.0, "wall_time": moment, **more}


@pytest.mark.parametrize(
    ("lines", "kwh", "scope", "source"),
    [
        ([machine_line(100.0)], None, [], []),
        ([machine_line(100.0, devices={"watts": [None, "x"]})], None, [], []),
        (
            [machine_line(100.0, devices={"watts": [600, 600, None]}, power="NVML")],
            *(0.02, ["GPUs"], ["NVML"]),
        ),
        (
            [
                machine_line(100.0, devices={"watts": [1200]}, joules={"cpu": 36_000}),
                machine_line(160.0, joules={"cpu": 36_000}),
            ],
            *(0.04, ["GPUs", "processors"], ["NVML", "RAPL"]),
        ),
        # of a whole node, its GPUs are part
        (
            [machine_line(100.0, devices={"watts": [1200]}, joules={"node": 180_000, "cpu": 9})],
            *(0.05, ["nodes"], ["Cray pm_counters"]),
        ),
    ],
)
def test_energy_of_lines(
    tmp_path: Path,
    lines: list[dict[str, Any]],
    kwh: float | None,
    scope: list[str],
    source: list[str],
) -> None:
    tree(
        tmp_path,
        {"machine/n2.jsonl": "", "machine/n1.jsonl": b"".join(map(to_line, lines)).decode()},
    )
    found, later = energy_between(tmp_path, [1000.0])
    assert later is None
    if kwh is None:
        assert found is None
        return
    assert found is not None
    told = found.to_json(240.0)
    assert told["kwh"] == pytest.approx(kwh)
    assert (told["scope"], told["source"]) == (scope, source)
    assert told["coverage"] == len(lines) / 4


def test_of_many_hosts_no_more_is_read_than_is_allowed(tmp_path: Path) -> None:
    """What small files do not need, large ones get; of each its end, which is the newest."""
    sizes = {"n0": 0, "n1": 300, **{f"n{i}": 2000 for i in range(2, 64)}}
    for host, count in sizes.items():
        lines = (f'{{"kind": "machine", "step": {i}}}\n' for i in range(count))
        tree(tmp_path, {f"machine/{host}.jsonl": "".join(lines)})
    before = bytes_read()
    hosts = read_hosts(tmp_path, total_bytes=2**20)
    taken = bytes_read() - before
    assert 0.9 * 2**20 < taken < 2**20 + 64 * 2**14
    assert len(hosts["n1"]) == 300
    assert {lines[-1]["step"] for host, lines in hosts.items() if host != "n1"} == {1999}
    assert 400 < len(hosts["n2"]) < 600
    before = bytes_read()
    assert len(read_hosts(tmp_path, 2**9)["n1"]) < 20
    assert bytes_read() - before < 64 * 2**14
    assert len(read_hosts(tmp_path)["n2"]) == 2000


def bytes_read() -> int:
    """All that this process has read, by the kernel's count."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_energy_of_a_run_and_its_jobs(tmp_path: Path) -> None:
    began = time.time() - 1000
    for number, after in ((1, 0), (2, 300), (10, 600)):
        start, end = (timestamp(began + after + more) for more in (0, 120))
        record = {"nodes": [{"host": "n1"}], "start": start, "end": end}
        tree(tmp_path, {f"jobs/{number}.json": json.dumps(record)})
    path = file_of(tmp_path, "n1")
    path.parent.mkdir()
    with path.open("wb") as file:
        for after in (60, 121, 660):
            file.write(to_line(machine_line(began + after, joules={"cpu": 36_000})))
    jobs = job_times(tmp_path)
    energy = energy_of_run(tmp_path, jobs)
    assert energy is not None
    assert energy["kwh"] == pytest.approx(0.03)
    assert energy["coverage"] == 0.5
    assert energy["jobs"] == {"1": pytest.approx(0.02), "2": None, "10": pytest.approx(0.01)}
    assert energy_line(energy) == "0.03 kWh of processors (RAPL, 50 % of the node-hours)"
    assert energy_line(energy_of_run(tmp_path / "none", [])) == "not measured"
    assert node_hours(jobs) == (pytest.approx(0.1), 0)


def test_without_a_gpu_there_is_none_and_no_word_of_it(capfd: pytest.CaptureFixture[str]) -> None:
    """The library of NVIDIA's is there, its driver is not."""
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        pass
    else:
        pytest.skip("this machine has a GPU")
    assert NvmlDevices().read() == []
    assert find_devices("cuda").read() == []
    assert find_devices("cpu").read() == ()
    assert capfd.readouterr() == ("", "")


def test_what_is_asked_of_nvml_is_there_to_be_asked() -> None:
    pynvml = pytest.importorskip("pynvml")
    source = Path(devices.__file__).read_text(encoding="utf-8")
    asked = set(re.findall(r"nvml\.((?:nvml|NVML)\w+)", source))
    asked |= {f"nvmlClocksThrottleReason{name}" for name, _ in devices._REASONS}
    assert len(asked) > 15
    assert [name for name in sorted(asked) if not hasattr(pynvml, name)] == []


def figures(rank: int, steps: int, **numbers: int) -> RankFigures:
    usual = {"device": rank, "elapsed": steps * 10**9, "data": 0, "others": 0, "apart": 0}
    counts = {"step": 100 + steps, "steps": steps, "allocated": 0, "peak": 0}
    return RankFigures(rank=rank, **{**usual, **counts, **numbers})


def test_a_line_tells_of_the_seconds_since_the_last_one() -> None:
    first = Reading(
        moment=10.0,
        cores=4,
        busy_seconds=100.0,
        job_seconds=50.0,
        throttled_seconds=1.0,
        memory_bytes=(8_000_000, 1_000_000),
        network_bytes={"eth0": (0, 0), "gone": (0, 0)},
    )
    second = Reading(
        moment=20.0,
        cores=4,
        busy_seconds=120.0,
        job_seconds=65.0,
        throttled_seconds=2.0,
        memory_bytes=(8_000_000, 2_000_000),
        network_bytes={"eth0": (30_000_000, 50_000_000)},
    )
    assert node_facts([first, second]) == {
        "seconds": 10.0,
        "cpu": {"cores": 4, "busy": 0.5, "job": 1.5, "throttled": 0.1},
        "memory": {"total": 8, "used": 2},
        "network": {"eth0": [3.0, 5.0]},
    }
    hot = DeviceReading(name="A", busy=0.5, celsius=80.0, throttled="hot")
    cool = DeviceReading(name="A", busy=1.0, celsius=60.0)
    assert device_facts([[hot], [cool]]) == {
        "devices": {"name": ["A"], "busy": [0.75], "celsius": [80.0], "throttled": ["hot"]}
    }
    before = {0: figures(0, 10), 1: figures(1, 10)}
    now = {
        0: figures(0, 20, elapsed=30 * 10**9, apart=4 * 10**9, data=10**9, others=2 * 10**9),
        1: figures(1, 10),  # has not got on
        2: figures(2, 2),  # has just begun
    }
    assert rank_facts(before, now) == {
        "ranks": {
            "count": 2,
            "rank": [0, 2],
            "device": [0, 2],
            "step": [1.6, 1.0],
            "data": [0.1, 0.0],
            "others": [0.2, 0.0],
        }
    }


def test_of_many_ranks_a_line_has_a_few_with_the_slowest_and_the_fastest() -> None:
    now = {rank: figures(rank, 10, elapsed=(rank * 7 % 128 + 1) * 10**9) for rank in range(128)}
    ranks = rank_facts({}, now)["ranks"]
    assert (ranks["count"], len(ranks["rank"])) == (128, MOST_RANKS)
    assert ranks["rank"] == sorted(ranks["rank"])
    assert {min(ranks["step"]), max(ranks["step"])} == {0.1, 12.8}


def test_every_rank_notes_numbers_that_the_others_of_its_node_see() -> None:
    import mmap

    memory = mmap.mmap(-1, 4096)
    pulses = [Pulse(), Pulse()]
    pulses[0].note(range(NUM_NOTES))
    for index, pulse in enumerate(pulses):
        pulse.share(memory, index)
    pulses[1].note(range(10, 10 + NUM_NOTES))
    pulses[1].step_done(5)
    assert pulses[0].notes()[:2] == [
        list(range(NUM_NOTES)),
        list(range(10, 10 + NUM_NOTES)),
    ]
    assert Pulse().notes() == [[0] * NUM_NOTES]
    assert len(RankFigures._fields) == NUM_NOTES


@pytest.mark.parametrize("num_hosts", [1, 8, 256])
@pytest.mark.parametrize("idle_days", [0, 30])
def test_no_week_of_a_run_has_more_bytes_than_it_may(num_hosts: int, idle_days: int) -> None:
    """Also not after a pause, nor over ever new jobs; and the first minutes are all there."""
    now, written, size = [0.0], [], 800
    allowance = Allowance(num_hosts, None, lambda: now[0])
    for minute in range(3 * WEEK // 60):
        if minute == 20_000:
            now[0] += idle_days * 86_400
        if minute % 1000 == 999:  # a new job, on the same host
            allowance = Allowance(num_hosts, now[0] - written[-1], lambda: now[0])
        now[0] += 60
        if allowance.take(size):
            written.append(now[0])
    assert written[:10] == [60.0 * count for count in range(1, 11)]
    most = max(sum(since <= moment < since + WEEK for moment in written) for since in written[::50])
    assert most * size * num_hosts <= WEEK_BYTES
    if num_hosts == 1:
        assert most == WEEK // 60


def test_of_many_nodes_256_write() -> None:
    for nodes in (1, 2, 255, 256, 257, 512, 1000, 9408):
        writing = sum(is_recorded(node, nodes) for node in range(nodes))
        assert is_recorded(0, nodes)
        assert writing <= 256
        assert writing == nodes if nodes <= 256 else writing > 128


def test_a_name_of_a_host_leads_nowhere_else(tmp_path: Path) -> None:
    assert file_of(tmp_path, "../\x1b[31mnode\n").parent == tmp_path / "machine"
    assert file_of(tmp_path, "../\x1b[31mnode\n").name == "..---31mnode-.jsonl"


def test_a_node_is_recorded_until_the_job_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "SAMPLE_SECONDS", 0.02)
    stop = threading.Event()
    recording = Recorder(
        tmp_path,
        "n0",
        num_nodes=1,
        kind="cpu",
        notes=lambda: [figures(0, 7), [0] * NUM_NOTES],
        names_slow=True,
    )
    thread = threading.Thread(target=recording.record_until, args=(stop,))
    thread.start()
    try:
        end = time.monotonic() + 300
        while not signs_of_life(tmp_path) and time.monotonic() < end:
            time.sleep(0.01)
    finally:
        stop.set()
        thread.join(300)
    lines = read_hosts(tmp_path)["n0"]
    assert len(lines) == 2  # the first one soon, the last one at the end
    assert [each["step"] for each in lines] == [107, 107]
    assert lines[0]["ranks"]["rank"] == [0]
    assert signs_of_life(tmp_path) == [each["wall_time"] for each in lines]


def test_no_figures_are_no_reason_for_a_job_to_fail(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts: dict[str, Any] = {"node_rank": 0, "num_nodes": 1, "local_rank": 0, "kind": "cpu"}
    gone = tmp_path / "gone"
    with recorder.machine_recorded(gone, "n0", notes=list, **facts):
        pass
    assert not gone.exists()
    assert caplog.text.count("no more machine figures of n0") == 1
    with recorder.machine_recorded(tmp_path, "n0", notes=list, **{**facts, "local_rank": 1}):
        assert "hpctrain-machine" not in {thread.name for thread in threading.enumerate()}


def ranks_line(first: int, seconds: list[float], wall_time: float, **more: Any) -> dict[str, Any]:
    ranks = {
        "count": len(seconds),
        "rank": list(range(first, first + len(seconds))),
        "device": list(range(len(seconds))),
        "step": [2.0] * len(seconds),
        "data": [0.01] * len(seconds),
        "others": [2.0 - own for own in seconds],
    }
    facts = {"kind": "machine", "step": 1, "wall_time": wall_time, "seconds": 60.0}
    return {**facts, "ranks": {**ranks, **more.pop("ranks", {})}, **more}


def test_a_rank_that_others_wait_for_is_named_by_its_own_time_alone() -> None:
    """All steps take the same two seconds; one rank waits for nobody in them."""
    hosts = {
        "n0": [ranks_line(0, [1.0, 1.01], 60.0 * minute) for minute in range(1, 9)],
        "n1": [
            ranks_line(2, [1.02, 1.5 if minute > 4 else 1.0], 60.0 * minute + 2)
            for minute in range(1, 9)
        ],
    }
    (found,) = stragglers(hosts)
    assert (found.rank, found.host, found.device) == (3, "n1", 1)
    assert (found.seconds, found.usual_seconds) == (pytest.approx(1.5), pytest.approx(1.01))
    assert found.since == 60.0 * 5 + 2 - 60
    assert found.line("12:00:00") == (
        "rank 3 on n1, device 1 is 49 % slower than the others since 12:00:00: 1.5 s of a step "
        "are its own, 1.01 s of the rank in the middle"
    )


def test_a_straggler_has_a_cause_where_one_is_known() -> None:
    throttled = {"throttled": ["", "hot"]}
    hot = [ranks_line(0, [1.0, 1.0, 1.0], 1.0) for _ in range(3)]
    slow = [ranks_line(3, [1.0, 1.5], 1.0, devices=throttled) for _ in range(3)]
    assert stragglers({"a": hot, "b": slow})[0].why == "its device is throttled: hot"
    for each in slow:
        each["ranks"]["data"] = [0.0, 0.4]
    assert stragglers({"a": hot, "b": slow})[0].why == "it waits for its data"


def test_a_hiccup_an_equal_world_and_strange_lines_name_nobody() -> None:
    hiccup = [ranks_line(0, [1.0, 1.0, own], 1.0) for own in (1.0, 3.0, 3.0)]
    assert stragglers({"a": hiccup}) == []
    assert stragglers({"a": [ranks_line(0, [1.0, 1.1], 1.0)] * 5}) == []
    assert stragglers({}) == []
    strange: list[Any] = [
        {"kind": "machine", "step": 1, "wall_time": 1.0, "ranks": ranks}
        for ranks in (None, [], {"rank": 1}, {"rank": ["x"], "step": [None], "others": [1]})
    ]
    assert stragglers({"a": strange, "b": [*strange, {"kind": "straggler", "step": 0}]}) == []


def test_a_slow_rank_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = MachineLog(tmp_path, "n1", 1)
    for _ in range(4):
        log.append(ranks_line(0, [1.0, 1.0, 1.6], 0.0))
    recorder = Recorder(tmp_path, "n0", num_nodes=1, kind="cpu", notes=list, names_slow=True)
    recorder._log = MachineLog(tmp_path, "n0", 1)
    recorder._warn_slow()
    recorder._warn_slow()
    assert caplog.text.count("rank 2 on n1, device 2 is 60 % slower") == 1
    (line,) = read_hosts(tmp_path)["n0"]
    assert (line["kind"], line["rank"], line["host"]) == ("straggler", 2, "n1")
    assert machine_log.FOLDER == "machine"
    for each in (log, recorder._log):
        each.close()
