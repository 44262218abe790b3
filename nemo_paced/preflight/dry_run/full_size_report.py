"""What the full-size dry run found, as a table."""

from __future__ import annotations

from rich.table import Table

from nemo_paced.preflight.dry_run.full_size import FullRank
from nemo_paced.sizing.hardware import GIB


def memory_table(of: FullRank) -> Table:
    """Table of the most GiB in each phase, counted and as planned; what disagrees is marked."""
    caption = ""
    if of.more_signal:
        caption = f"the whole batch's teacher signal is {of.more_signal / GIB:.2f} GiB more"
    table = Table(
        title=f"GiB of rank {of.rank} (stage {of.stage})",
        title_justify="left",
        caption=caption,
        caption_justify="left",
    )
    table.add_column("")
    for name in ("counted", "plan", "ratio"):
        table.add_column(name, justify="right")
    for phase in of.phases:
        table.add_row(
            phase.name,
            f"{phase.counted / GIB:.2f}",
            f"{phase.planned / GIB:.2f}",
            f"{phase.ratio:.3f}" + ("" if phase.agrees else " !"),
        )
    return table
