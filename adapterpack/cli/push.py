"""``adapterpack push``."""

from __future__ import annotations

import click

import adapterpack

from ..hub.names import Reference
from .options import shared
from .output import emit, line
from .progress import byte_bar


@click.command("push")
@click.argument("pack", metavar="PACK|BUNDLE")
@click.argument("target", metavar="hf://ORG/NAME[/FOLDER]")
@click.option("--pr", is_flag=True, help="Open a pull request instead of committing to the branch.")
@click.option("--tag", metavar="TAG", help="Name the commit; a tag never moves.")
@click.option("--private", is_flag=True, help="If the repository is made anew, only you may see it.")
@click.option("--dry-run", is_flag=True, help="Make every check and say what would be sent.")
@click.option("--base-model", metavar="ORG/NAME", help="Where others find the base, if the pack does not say it.")
@click.option("--license", "license_name", metavar="L", help="The license, if the pack does not say it.")
@click.option("-m", "--message", metavar="TEXT", help="The commit's message.")
@shared
def command(*, pack: str, target: str, pr: bool, tag: str | None, private: bool, dry_run: bool, base_model: str | None,
            license_name: str | None, message: str | None, as_json: bool) -> None:
    """Publishes a pack or a bundle in a repository of a hub as one commit, after checking it, and reads back what arrived.

    The token is the one of "hf auth login", or HF_TOKEN; HF_ENDPOINT names another hub than the public one. Equal content is left alone.
    With FOLDER the artifact goes into that folder of the repository, and everything else there stays.

    \b
    Example:
      adapterpack push packs/tickets hf://org/tickets --license apache-2.0 --tag v1
    """
    with byte_bar("push") as progress:
        done = adapterpack.push(pack, target, pr=pr, tag=tag, private=private, dry_run=dry_run, base_model=base_model, license=license_name,
                                message=message, progress=progress)
    if as_json:
        emit({"command": "push", **done.to_json()})
        return
    address = Reference(done.repo, folder=done.folder).address
    would = "would be " if dry_run else ""
    if not done.sent and not done.deleted:
        line(f"{address} holds this {done.kind} already: {done.id}")
    for what, names in (("sent", done.sent), ("deleted", done.deleted)):
        if names:
            line(f"{would}{what}: {', '.join(names)}")
    if done.pull_request:
        line(f"pull request: {done.pull_request}")
    if done.commit and not dry_run:
        line(f"{address}@{done.commit} holds {done.id}" + (f", tag {done.tag}" if done.tag else ""))
