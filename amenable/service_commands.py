"""The commands about the service of a run: serve, pin, and the tokens of those who use it. `cli` adds them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from amenable.arguments import Address, AsJson, Run
from amenable.ending import ending

ENDING = "Ending the service when the requests under way are answered; once more to end it at once."

TokenFile = Annotated[Path, typer.Argument(metavar="FILE", help="The token file; made where there is none.")]

tokens = typer.Typer(
    help="Who may use a service: tokens with scopes, of which the file keeps hashes.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def add_to(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    for command in (serve, pin):
        app.command()(command)
    app.add_typer(tokens, name="tokens")


def serve(
    run: Run,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Where to listen; beyond this machine only with tokens.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", help="The port to listen on.")] = 8000,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", metavar="FILE", help="Who may use it, from amenable tokens add.")
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Serve a run's models: an OpenAI-compatible API and a page for spot checks. It follows PPO while that trains."""
    from amenable.interruption import listening

    with ending(as_json, lambda: "the service") as answer, listening(ENDING):
        from amenable.serve import serve as served  # within: numpy begins threads
        from amenable.serve import served_run

        def ready(found: dict[str, Any]) -> None:
            answer(found)
            if not as_json:
                from amenable.outcome import short_path

                who = "this machine alone, without a token" if found["open"] else "whoever has a token"
                typer.echo(f"Serving {short_path(found['run'])} at {found['url']} to {who}. Ctrl-C ends it.")
                if found["no_haproxy"] is not None:
                    typer.echo(f"Requests pass Ray Serve's slower proxy in Python: {found['no_haproxy']}.")

        served(served_run(run), host, port, address, token_file, ready)


def pin(
    run: Run,
    version: Annotated[
        str | None,
        typer.Argument(metavar="VERSION", help="policy@UPDATE, or newest; without, what is served is told."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say which version a run's service should serve as policy. Its replicas follow within seconds."""
    with ending(as_json, lambda: "the wish for a version") as answer:
        from amenable.serve import pin as asked
        from amenable.serve import served_run, told

        found = asked(served_run(run), version)
        answer(found)
        if not as_json:
            typer.echo(told(found))


@tokens.command("add")
def add_token(
    file: TokenFile,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is.")],
    scopes: Annotated[str, typer.Option(metavar="SCOPES", help="Some of read,score,operate.")] = "read,score",
    as_json: AsJson = False,
) -> None:
    """Make a token and show it, once."""
    with ending(as_json, lambda: "the new token") as answer:
        from amenable.serve import scopes_of
        from serving.access import new_token

        made = new_token(file, name, scopes_of(scopes))
        answer({"token": made})
        if not as_json:
            typer.echo(f"{made}\nKeep it: the file has its hash alone.")


@tokens.command("list")
def list_tokens(file: TokenFile, as_json: AsJson = False) -> None:
    """List the tokens of a file."""
    with ending(as_json, lambda: "the list of tokens") as answer:
        from serving.access import read_tokens

        found = read_tokens(file).values()
        answer(
            {"tokens": [{"id": t.id, "name": t.name, "scopes": sorted(t.scopes), "created": t.created} for t in found]}
        )
        if not as_json:
            for each in found:
                typer.echo(f"{each.id}  {','.join(sorted(each.scopes))}  {each.created}  {each.name}")


@tokens.command("revoke")
def revoke(
    file: TokenFile,
    token: Annotated[str, typer.Argument(metavar="ID", help="The token's id, as amenable tokens list has it.")],
    as_json: AsJson = False,
) -> None:
    """Take a token back. A service that runs refuses it at once, and the sessions that it opened."""
    with ending(as_json, lambda: "the token") as answer:
        from serving.access import revoke_token

        revoke_token(file, token)
        answer({"revoked": token})
        if not as_json:
            typer.echo(f"Token {token} is revoked.")
