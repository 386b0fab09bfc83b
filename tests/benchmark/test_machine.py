"""What is recorded about a machine, from a file tree as a Jetson and a notebook have it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hywu_export.benchmark.machine import Machine, suspicions
from hywu_export.benchmark.meters import Ina3221, Rapl, energy_meters, peak_memory, resident_memory


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


CPU = "sys/devices/system/cpu/cpu0/cpufreq/"
JETSON = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n",
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "proc/meminfo": "MemTotal:       64349944 kB\n",
    "proc/loadavg": "0.10 0.2 0.3 1/2 3\n",
    f"{CPU}scaling_min_freq": "729600",
    f"{CPU}scaling_max_freq": "2201600",
    f"{CPU}scaling_cur_freq": "1344000",
    f"{CPU}scaling_governor": "schedutil",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": "48250",
    "sys/class/thermal/thermal_zone1/type": "cv0-thermal",
    "sys/class/thermal/thermal_zone1/temp": "-256000",  # what an unpowered zone says
    "sys/class/devfreq/17000000.gpu/cur_freq": "1300500000",
}
RAILS = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/"
INA = {
    f"{RAILS}in1_label": "VDD_GPU_SOC",
    f"{RAILS}in1_input": "19000",
    f"{RAILS}curr1_input": "100",
    f"{RAILS}in2_label": "VDD_IN",
    f"{RAILS}in2_input": "19000",
    f"{RAILS}curr2_input": "1000",
}


def test_a_jetson(tmp_path: Path) -> None:
    machine = Machine(write(tmp_path, **JETSON))
    record = machine.record()
    model = "NVIDIA Jetson AGX Orin Developer Kit"
    assert record["jetson"] == {"model": model, "l4t": "36.4.3", "jetson_clocks": False, "gpu_mhz": 1300.5}
    assert record["memory"] == 64349944 * 1024
    state = machine.state()
    assert state["cpu_mhz"] == {"min": 1344.0, "max": 1344.0}
    assert state["temperatures"] == {"cpu-thermal": 48.25}
    assert suspicions(record, state, state) == ["jetson_clocks is not set: clocks follow the load"]
    record["jetson"]["nvpmodel"] = "MODE_30W"
    assert "the power mode is MODE_30W, not MAXN" in suspicions(record, state, state)
    write(tmp_path, **{f"{CPU}scaling_min_freq": "2201600"})
    assert machine.jetson() is not None
    assert machine.record()["jetson"]["jetson_clocks"] is True


def test_a_notebook(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        **{
            "sys/class/power_supply/BAT0/status": "Discharging",
            "sys/firmware/acpi/platform_profile": "low-power",
            "proc/loadavg": "3.20 1 1 1/2 3",
            "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "4",
        },
    )
    record, before = Machine(root).record(), Machine(root).state()
    write(root, **{"sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "5"})
    found = suspicions(record, before, Machine(root).state())
    assert [text.split(" ")[1] for text in found] == ["machine", "platform", "CPU", "load"]
    assert Machine(root).jetson() is None


def test_an_empty_machine(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert suspicions(machine.record(), machine.state(), machine.state()) == []
    assert machine.busy() is None


def test_power_of_a_jetson_is_summed_up(tmp_path: Path) -> None:
    with energy_meters(None, write(tmp_path, **INA)) as meters:
        assert [meter.name for meter in meters] == ["ina3221"]
        assert isinstance(meters[0], Ina3221)
        assert meters[0].watts() == pytest.approx(19.0)
        start, before = time.perf_counter(), meters[0].joules()
        while meters[0].joules() < before + 4 and time.perf_counter() < start + 20:
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        assert meters[0].joules() - before == pytest.approx(19 * seconds, rel=0.4)


def test_a_counter_that_wraps(tmp_path: Path) -> None:
    zone = "sys/class/powercap/intel-rapl:0/"
    write(tmp_path, **{f"{zone}energy_uj": "9000000", f"{zone}max_energy_range_uj": "10000000"})
    rapl = Rapl.find(tmp_path)
    assert rapl is not None
    assert rapl.joules() == 0
    write(tmp_path, **{f"{zone}energy_uj": "2000000"})
    assert rapl.joules() == pytest.approx(3)


def test_memory_of_this_process() -> None:
    assert resident_memory() > 10e6
    assert peak_memory() > 0.9 * resident_memory()  # the two are counted in different ways
