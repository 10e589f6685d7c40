"""The table of devices, and a person's own."""

import pytest

from cluster.hardware import hardware_named, known_hardware
from corpus.problems import UsageProblem

MINE = """kind: gpu
memory_gib: 12
bf16_tflops: 50
fp32_tflops: 25
bandwidth_gb_per_s: 400
devices_per_node: 2
price_usd_per_hour: 0.3
"""


def test_every_device_has_a_source_and_a_price():
    table = known_hardware()
    assert {each.kind for each in table} == {"gpu", "cpu"}
    assert all(each.source and each.says and each.price_usd_per_hour > 0 for each in table)


def test_dense_figures_are_halves_of_those_with_sparsity():
    """NVIDIA's datasheets give 1,979 TFLOP/s for the H100 and 242 for the L4, with sparsity."""
    assert hardware_named("h100-80gb").flops("bfloat16") == pytest.approx(1979e12 / 2, rel=1e-3)
    assert hardware_named("l4-24gb").flops("bfloat16") == pytest.approx(242e12 / 2, rel=1e-3)
    assert hardware_named("a100-80gb").flops("float32") == 19.5e12


def test_a_file_describes_a_device(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(MINE)
    found = hardware_named(str(path))
    assert (found.name, found.price_usd_per_hour, found.memory_bytes) == ("mine", 0.3, 12 << 30)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MINE.replace("memory_gib: 12", "memory_gib: 0"), "memory_gib"),
        (MINE + "colour: red\n", "colour"),
        ("- 1\n", "key: value"),
        ("a: [", "cannot be read"),
        ("kind: gpu\n", "Field required"),
    ],
)
def test_a_wrong_description_is_refused_by_its_key(tmp_path, text, says):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageProblem, match=says) as told:
        hardware_named(str(path))
    assert "\n" not in str(told.value)


def test_a_name_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(UsageProblem, match="There is no hardware 'h1000'; the table has h100-80gb"):
        hardware_named("h1000")
