"""The sections of a report about the gradient SNR of a run."""

from __future__ import annotations

from pathlib import Path

from nemo_paced.report.sections.section import Section
from nemo_paced.report.snr_figure import snr_svg
from nemo_paced.snr.record import FOLDER, SnrRecord
from nemo_paced.snr.summary import summarise
from nemo_paced.snr.text import lead, measured_weights, sentences, table_rows, which_model

TITLE = "Gradient signal-to-noise ratio"


def snr_sections(run_dir: Path) -> list[Section]:
    """Sections on the run's SNR measurements, one a file, in the order of their names.

    Raises:
        ConfigError: a file of them cannot be read.
    """
    sections = []
    for path in sorted((run_dir / FOLDER).glob("*.json")):
        record = SnrRecord.read(path)
        summary = summarise(record)
        sections.append(
            Section(
                f"{TITLE} of the {measured_weights(record)}, "
                f"{record.divergence} along {record.responses}, {which_model(record)}",
                svg=snr_svg(record, summary),
                table=table_rows(summary),
                note=f"{lead(record)}.",
                points=[f"{sentence}." for sentence in sentences(record, summary)],
                wide=True,
            )
        )
    if not sections:
        note = f"Not measured in this run: nemo-paced snr {run_dir} does."
        return [Section(TITLE, note=note, wide=True)]
    return sections
