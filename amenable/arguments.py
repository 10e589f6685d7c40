"""Arguments and options that several commands have."""

from typing import Annotated

import typer

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of one that `amenable recipes` lists.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, as in seed=7 or ppo.policy.peak_lr=1e-5."),
]
Run = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's directory, its address, or the name of a run in ./runs.")
]
RunPath = Annotated[
    str | None, typer.Option("--run", metavar="DIR", help="The run's directory, instead of the recipe's.")
]
Address = Annotated[
    str | None,
    typer.Option("--address", metavar="ADDRESS", help="A Ray cluster, such as auto or HOST:6379; else a local one."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON answer on standard output, progress on standard error.")]
Variables = Annotated[
    list[str] | None,
    typer.Option(
        "--env",
        metavar="NAME",
        help="An environment variable that every node must have. Its value is never given here.",
    ),
]
