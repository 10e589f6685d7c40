"""The table of devices that plans reckon with (hardware.yaml), and a person's own entry."""

from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from corpus.problems import UsageProblem

TABLE = "hardware.yaml"


class Hardware(BaseModel):
    """One device: a GPU, or a CPU core."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    kind: Literal["gpu", "cpu"]
    says: str = ""
    memory_gib: float = Field(gt=0)
    bf16_tflops: float = Field(gt=0)
    fp32_tflops: float = Field(gt=0)
    bandwidth_gb_per_s: float = Field(gt=0)
    devices_per_node: int = Field(ge=1)
    price_usd_per_hour: float = Field(ge=0)
    source: str

    def flops(self, dtype: str) -> float:
        """Dense matrix products of `dtype`, FLOP/s."""
        return 1e12 * (self.bf16_tflops if dtype == "bfloat16" else self.fp32_tflops)

    @property
    def memory_bytes(self) -> int:
        """Memory of one device that a program can use."""
        return int(self.memory_gib * (1 << 30))

    @property
    def bandwidth(self) -> float:
        """Memory bandwidth, bytes a second."""
        return 1e9 * self.bandwidth_gb_per_s


def known_hardware() -> list[Hardware]:
    """The devices of the table, in its order."""
    import yaml

    table = resources.files("cluster").joinpath(TABLE).read_text(encoding="utf-8")
    return [Hardware(name=name, **entry) for name, entry in yaml.safe_load(table).items()]


def hardware_named(name_or_file: str) -> Hardware:
    """The device of that name in the table, or the one that a YAML file describes.

    Raises UsageProblem for a name that is not in the table, and for a file that does not describe one device.
    """
    known = {each.name: each for each in known_hardware()}
    if name_or_file in known:
        return known[name_or_file]
    path = Path(name_or_file)
    if not path.is_file():
        raise UsageProblem(
            f"There is no hardware {name_or_file!r}; the table has {', '.join(known)}, and a file describes another.",
            "plan/hardware",
        )
    return _described(path)


def _described(path: Path) -> Hardware:
    import yaml

    from corpus.storage import one_line

    try:
        entry: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageProblem(
            f"{path}: the description of hardware cannot be read ({one_line(error)}).", "plan/hardware"
        ) from None
    if not isinstance(entry, dict):
        raise UsageProblem(
            f"{path}: hardware is described by 'key: value' lines, as in cluster/{TABLE}.", "plan/hardware"
        )
    try:
        return Hardware.model_validate({"name": path.stem, "source": str(path), **entry})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise UsageProblem(f"{path}: {key}: {first['msg']}.", "plan/hardware") from None
