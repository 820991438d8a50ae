"""The command `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from hildanext.errors import UsageError
from hildanext.export.diffusers import export_diffusers
from hildanext.export.hub_card import export_hub_card, listed, push
from hildanext.export.sdar import export_sdar
from hildanext.export.source import open_checkpoint

Target = Literal["sdar", "diffusers", "hub-card"]


def export(
    folder: Path,
    target: Target,
    out: Path | None,
    *,
    licence: str | None = None,
    reports: list[Path] | None = None,
    repository: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Export a converted checkpoint into the new folder `out`, by default FOLDER-TARGET beside it.

    repository: one on the hub to upload the folder to; with dry_run, what would go is shown instead. Raises UsageError
    for an existing `out`, and the errors of the targets.
    """
    folder = Path(folder)
    out = folder.with_name(f"{folder.name}-{target}") if out is None else out
    if target != "hub-card" and (licence or reports or repository or dry_run):
        raise UsageError("--licence, --report, --push and --dry-run are for --to hub-card; leave them out")
    if dry_run and repository is None:
        raise UsageError("--dry-run shows what --push would upload; give --push REPOSITORY")
    if out.exists():
        raise UsageError(f"{out} exists; choose another --out")
    checkpoint = open_checkpoint(folder)
    if target == "sdar":
        return export_sdar(checkpoint, out)
    if target == "diffusers":
        return export_diffusers(checkpoint, out)
    result = export_hub_card(checkpoint, out, licence, reports)
    if repository is None:
        return result
    if dry_run:
        return result | {"would_push": {"repository": repository, "files": listed(out)}}
    return result | {"pushed": push(out, repository)}
