"""Figures of accuracies: bars by model, and intervals of their differences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nemo_paced.report.drawing import COLOURS, INK, axes_of, legend, shown_name, style, to_svg

LABELS_IN_A_ROW = 36  # characters below an axis before they overlap


def accuracy_bars(labels: Sequence[str], suites: dict[str, list[tuple[float, float]]]) -> str:
    """Bars of mean@k with its standard error, by model and suite, as inline SVG.

    Names that do not fit below the bars stand beside them.

    Args:
        labels: of the models.
        suites: suite -> (mean, standard error) of each model.
    """
    names = [shown_name(label) for label in labels]
    upright = sum(map(len, names)) <= LABELS_IN_A_ROW
    with style():
        height = None if upright else 1.2 + 0.22 * len(labels) * len(suites)
        figure, axes = axes_of(height)
        width, at = 0.8 / len(suites), np.arange(len(labels))
        for index, (suite, values) in enumerate(suites.items()):
            means, errors = (np.nan_to_num(column) for column in zip(*values, strict=True))
            places = at + (index - (len(suites) - 1) / 2) * width
            look = {"color": COLOURS[index % len(COLOURS)], "label": shown_name(suite),
                    "ecolor": INK, "capsize": 3}  # fmt: skip
            if upright:
                axes.bar(places, means, width * 0.92, yerr=errors, **look)
            else:
                axes.barh(places, means, width * 0.92, xerr=errors, **look)
        if upright:
            axes.set(xticks=at, xticklabels=names, ylabel="mean@k", ylim=(0, 1))
        else:
            axes.set(yticks=at, yticklabels=names, xlabel="mean@k", xlim=(0, 1))
            axes.invert_yaxis()
        axes.grid(visible=False, axis="x" if upright else "y")
        legend(axes)
        return to_svg(figure, "Accuracy by model")


def differences(
    labels: Sequence[str], suites: dict[str, list[tuple[float, float]]], reference: str
) -> str:
    """Intervals of accuracy minus the reference model's, ± two standard errors, as inline SVG.

    Args:
        labels: of the models.
        suites: suite -> (mean difference, standard error) of each model.
        reference: name of the model that is subtracted.
    """
    with style():
        figure, axes = axes_of(height=1.4 + 0.28 * len(labels) * len(suites))
        at = np.arange(len(labels))
        for index, (suite, values) in enumerate(suites.items()):
            means, errors = zip(*values, strict=True)
            shift = (index - (len(suites) - 1) / 2) * 0.5 / len(suites)
            axes.errorbar(means, at + shift, xerr=2 * np.nan_to_num(errors), fmt="o", capsize=3,
                          color=COLOURS[index % len(COLOURS)],
                          label=shown_name(suite))  # fmt: skip
        axes.axvline(0, color=INK, lw=1)
        axes.set(
            yticks=at,
            yticklabels=[shown_name(label) for label in labels],
            ylim=(len(labels) - 0.5, -0.5),
            xlabel=f"mean@k minus {shown_name(reference)}",
        )
        axes.grid(visible=False, axis="y")
        legend(axes)
        return to_svg(figure, f"Accuracy minus that of {reference}")
