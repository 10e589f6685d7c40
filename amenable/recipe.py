"""The recipe: everything a run is told, composed of the slices that the rooms own."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from amenable.run_names import check_run_name


def _run_directory_for(values: dict[str, Any]) -> Path:
    return Path("runs") / values["name"]


class Recipe(BaseModel):
    """What a run is told. Frozen; a key that is not listed here is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, AfterValidator(check_run_name)] = Field(
        description="Name of the run; it also names its directory."
    )
    run_directory: Path = Field(
        default_factory=_run_directory_for,
        description="Where the run writes. Default: runs/NAME in the directory the command is started in.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        description="Seed of every random choice of the run. Default 0: the project's choice; the paper gives none.",
    )
