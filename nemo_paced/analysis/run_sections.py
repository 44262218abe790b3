"""All sections about one run but its accuracy, in the order of a report."""

from __future__ import annotations

from nemo_paced.analysis.pass_rate_sections import pass_rate_sections
from nemo_paced.analysis.run_files import RunFiles
from nemo_paced.analysis.sections import Section
from nemo_paced.analysis.setting_sections import (
    certificate_sections,
    configuration_section,
    environment_section,
)
from nemo_paced.analysis.snr_section import snr_sections
from nemo_paced.analysis.timing_sections import timing_sections
from nemo_paced.analysis.training_sections import rollout_sections, training_sections


def run_sections(run: RunFiles) -> list[Section]:
    """Pass rates and weights, training, rollouts, time, SNR, FP8, environment, configuration."""
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
