"""All sections about one run but its accuracy, in the order of a report."""

from __future__ import annotations

from nemo_paced.report.run_files import RunFiles
from nemo_paced.report.sections.pass_rates import pass_rate_sections
from nemo_paced.report.sections.section import Section
from nemo_paced.report.sections.settings import (
    certificate_sections,
    configuration_section,
    environment_section,
)
from nemo_paced.report.sections.snr import snr_sections
from nemo_paced.report.sections.timing import timing_sections
from nemo_paced.report.sections.training import rollout_sections, training_sections


def run_sections(run: RunFiles) -> list[Section]:
    """Sections on pass rates, training, rollouts, time, SNR, FP8, environment, configuration."""
    return [
        *pass_rate_sections(run),
        *training_sections(run.rows),
        *rollout_sections(run.rows),
        *timing_sections(run.rows, run.starts),
        *snr_sections(run.directory),
        *certificate_sections(run),
        environment_section(run),
        configuration_section(run),
    ]
