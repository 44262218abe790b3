"""Report sections on a run's settings and surroundings: FP8 certificate, environment, config."""

from __future__ import annotations

from nemo_paced.report.run_files import RunFiles
from nemo_paced.report.sections.section import Section
from nemo_paced.run.environment import ENVIRONMENT_FILE, Start
from nemo_paced.teacher.fp8.certificate import CERTIFICATE_FILE, Certificate


def certificate_sections(run: RunFiles) -> list[Section]:
    """Section on how far FP8 moves the teacher; none for a run whose teacher is not in FP8."""
    title = "Teacher in FP8"
    if run.certificate is not None:
        return [_certificate_section(title, run.certificate, run.setting("teacher.fp8.max_kl"))]
    if run.setting("teacher.fp8.enabled"):
        missing = f"teacher.fp8.enabled is true and there is no {CERTIFICATE_FILE} yet: it is "
        return [Section(title, missing=missing + "measured before the first step.")]
    return []


def environment_section(run: RunFiles) -> Section:
    """Section on the environment of the last start, and on what differed at earlier ones."""
    title = "Environment"
    if not run.starts:
        missing = f"There is no {ENVIRONMENT_FILE}: training writes it when it starts."
        return Section(title, missing=missing)
    *earlier, last = [environment(start) for start in run.starts]
    table = [["what", "as it was at the last start"], *([k, v] for k, v in last.items())]
    points = []
    for start, then in zip(run.starts[:-1], earlier, strict=True):
        other = [f"{k} {then.get(k, 'none')}" for k in then | last if then.get(k) != last.get(k)]
        changes = f"with {', '.join(other)}" if other else "alike"
        points.append(f"Started at {start.time}, from step {start.step}, {changes}.")
    now = run.starts[-1]
    note = f"Started at {now.time}, from step {now.step}."
    if not now.commit:
        note += " The package was installed, not run from a git checkout."
    return Section(title, table=table, note=note, points=points)


def environment(start: Start) -> dict[str, str]:
    """The environment of a start as it is shown: name -> value."""
    devices = ", ".join(f"{count} x {name}" for name, count in start.devices.items())
    shown = {
        "ranks that train": f"{devices}, on {start.nodes} node{'s' * (start.nodes > 1)}",
        "processor": start.processor,
        "memory of a node": f"{start.memory_gib:g} GiB",
        "git commit": start.commit,
        "CUDA": start.cuda,
        "system": start.system,
        "Python": start.python,
        **start.versions,
    }
    return {name: value for name, value in shown.items() if value}


def configuration_section(run: RunFiles) -> Section:
    if run.config:
        return Section("Configuration", text=run.config, wide=True)
    return Section("Configuration", missing="There is no config.yaml.", wide=True)


def _certificate_section(title: str, certificate: Certificate, bound: object) -> Section:
    table = [
        ["over response tokens", "figure"],
        ["KL(BF16 || FP8), mean (nats)", f"{certificate.kl_mean:.3g}"],
        ["median", f"{certificate.kl_median:.3g}"],
        ["99th percentile", f"{certificate.kl_p99:.3g}"],
        ["largest", f"{certificate.kl_max:.3g}"],
        ["same likeliest next token", f"{certificate.top1_agreement:.2%}"],
        ["gradient off by", f"{certificate.gradient_difference:.2%}"],
        ["cosine of the gradients", f"{certificate.gradient_cosine:.5f}"],
    ]
    if bound is not None:
        table.insert(2, ["allowed (teacher.fp8.max_kl)", f"{bound:g}"])
    versions = ", ".join(f"{name} {version}" for name, version in certificate.versions.items())
    return Section(
        title,
        table=table,
        note=f"Against the same teacher in full precision, before the first step, over "
        f"{certificate.tokens} tokens of {certificate.problems} {certificate.responses}. It drifts "
        "most where it is unsure, as on a student's mistakes. The gradient is "
        f"{certificate.divergence}'s with respect to the student's hidden states. Backend "
        f"{certificate.backend}, recipe {certificate.recipe}; {versions}.",
    )
