"""One contender's correctness, memory and time; all contenders of a form in turns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from clock import Clock
from contenders import Absent, Contender, describe
from floors import Probe, linear_floor, logits_floor
from memory import peak_bytes, peak_rss_rise
from reference import Linear, Logits, plain_divergence


@dataclass(slots=True)
class Row:
    """All that was measured of one contender."""

    contender: Contender
    errors: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    peak_rss_bytes: int | None = None
    forward_s: list[float] = field(default_factory=list)
    backward_s: list[float] = field(default_factory=list)

    @property
    def total_s(self) -> list[float]:
        return [f + b for f, b in zip(self.forward_s, self.backward_s, strict=True)]


def measure(
    found: list[Contender | Absent],
    inputs: Logits | Linear,
    probe: Probe,
    args: Any,
    floors: dict[str, Any],
) -> tuple[list[Row], list[Absent]]:
    """Correctness, then memory, then time of every contender of one form; adds its floor."""
    absent = [c for c in found if isinstance(c, Absent)]
    rows: list[Row] = []
    reference = Reference(inputs, args.check_tokens)
    for contender in found:
        if isinstance(contender, Contender):
            tried = try_out(contender, inputs, reference)
            (rows if isinstance(tried, Row) else absent).append(tried)
    del reference
    laps = take_turns(rows, inputs, probe, args.warm_up, args.repeats)
    add_floor(floors, inputs, laps)
    return rows, absent


def try_out(contender: Contender, inputs: Logits | Linear, reference: Reference) -> Row | Absent:
    """Errors and peak memory, or why the contender cannot run here."""
    row = Row(contender)
    try:
        row.errors = reference.errors(contender)
        measure_memory(row, inputs, inputs.leaves[0].device)
    except Exception as error:  # out of memory, or a peer that cannot run here: named, not lost
        release(inputs)
        return Absent(contender.name, contender.form, contender.kind, describe(error))
    return row


def take_turns(
    rows: list[Row], inputs: Logits | Linear, probe: Probe, warm_up: int, repeats: int
) -> dict[str, list[float]]:
    """Time every contender once a turn; the probe's laps, by name, in seconds."""
    device = inputs.leaves[0].device
    laps: dict[str, list[float]] = {name: [] for name in probe.laps}
    for turn in range(warm_up + repeats):
        keep = turn >= warm_up
        for row in rows:
            forward_s, backward_s = one_step(row.contender, inputs, device)
            if keep:
                row.forward_s.append(forward_s)
                row.backward_s.append(backward_s)
        clock = Clock(device)
        probe.run(clock)
        for name, seconds in zip(probe.laps, clock.laps(), strict=True):
            if keep:
                laps[name].append(seconds)
    return laps


def one_step(contender: Contender, inputs: Logits | Linear, device: torch.device) -> list[float]:
    """Forward and backward seconds of the mean over tokens; gradients are fresh and then freed."""
    release(inputs)
    clock = Clock(device)
    loss = contender.total(inputs) / inputs.num_tokens
    clock.mark()
    loss.backward()
    clock.mark()
    times = clock.laps()
    release(inputs)
    return times


def release(inputs: Logits | Linear) -> None:
    for leaf in inputs.leaves:
        leaf.grad = None
        if hasattr(leaf, "main_grad"):
            leaf.main_grad.zero_()


def measure_memory(row: Row, inputs: Logits | Linear, device: torch.device) -> None:
    def run() -> None:
        one_step(row.contender, inputs, device)

    run()  # what is made once (compiled code, buffers of a library) is not counted
    row.peak_bytes = peak_bytes(run, device)
    if device.type == "cpu":
        row.peak_rss_bytes = peak_rss_rise(run)


class Reference:
    """Loss and its gradient to the logits in float64, of the first tokens; one kind at a time."""

    def __init__(self, inputs: Logits | Linear, tokens: int) -> None:
        self.inputs = inputs.first(tokens)
        self.logits = self.inputs.exact_logits()
        self.kind: str | None = None

    def errors(self, contender: Contender) -> dict[str, float]:
        """Largest differences of loss and gradients, also over the loss and largest gradient."""
        tokens = self.inputs.num_tokens
        if self.kind != contender.kind:
            mean = plain_divergence(self.logits, contender.kind).sum() / tokens
            self.loss = mean.item()
            (self.gradient_NV,) = torch.autograd.grad(mean, self.logits.leaves)
            self.kind = contender.kind
        release(self.inputs)
        mean = contender.total(self.inputs) / tokens
        gradients = tuple(
            leaf.main_grad if gradient is None else gradient
            for leaf, gradient in zip(
                self.inputs.leaves,
                torch.autograd.grad(mean, self.inputs.leaves, allow_unused=True),
                strict=True,
            )
        )
        found = self.inputs.differences(gradients, self.gradient_NV)
        loss = abs(mean.item() - self.loss)
        return {
            "loss": loss,
            "loss_relative": loss / abs(self.loss),
            "gradient": max(difference for difference, _ in found),
            "gradient_relative": max(difference / largest for difference, largest in found),
        }


def add_floor(
    floors: dict[str, Any], inputs: Logits | Linear, laps: dict[str, list[float]]
) -> None:
    least = {name: min(seconds) for name, seconds in laps.items()}
    if isinstance(inputs, Logits):
        size = inputs.student.numel() * inputs.student.element_size()
        floors |= logits_floor(least)
        for name, seconds in least.items():
            floors[f"{name}_gb_per_s"] = 2 * size / seconds / 1e9
    else:
        floors |= linear_floor(least)
        multiply_adds = (
            inputs.num_tokens
            * inputs.student_weight.shape[0]
            * (3 * inputs.student_weight.shape[1] + inputs.teacher_weight.shape[1])
        )
        floors["gemms_gflop_per_s"] = 2e-9 * multiply_adds / floors["floor_gemms"]
    floors |= {f"{name}_s": seconds for name, seconds in laps.items()}
