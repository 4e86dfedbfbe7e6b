"""The learning curve of a training run."""

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure

History = list[tuple[float, float]]  # loss and validation score, epoch by epoch


def draw_curve(axes: Axes, history: History, best_epoch: int) -> None:
    """Loss and validation score have no common unit, so each has its own axis; both are logarithmic."""
    epochs = range(1, len(history) + 1)
    other = axes.twinx()
    axes.plot(epochs, [loss for loss, _ in history], color="#4477aa", linewidth=1.3)
    other.plot(epochs, [validation for _, validation in history], color="#cc6677", linewidth=1.3)
    other.plot(best_epoch, history[best_epoch - 1][1], "o", color="#cc6677", label=f"kept: epoch {best_epoch}")
    other.legend(loc="upper right", fontsize=8)
    other.grid(visible=False)
    for axis, name, colour in ((axes, "loss", "#4477aa"), (other, "held-out score", "#cc6677")):
        axis.set_yscale("log")
        axis.set_ylabel(name, color=colour)
    axes.set_xlabel("epoch")


def learning_curve(history: History, best_epoch: int) -> bytes:
    """As PNG."""
    figure = Figure((8, 4), layout="constrained")
    draw_curve(figure.subplots(), history, best_epoch)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
