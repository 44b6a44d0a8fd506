"""Files and pictures of the routers in the output directory, and in the trackers that take images."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_moe_ext.router.history import HISTORY_FILE, RouterHistory
from trl_moe_ext.router.plots import save_heatmap, save_max_vio_curve

__all__ = ["CURVE_FILE", "HEATMAP_FILE", "RouterArtefacts"]

HEATMAP_FILE = "router_heatmap.png"
CURVE_FILE = "router_max_vio.png"


class RouterArtefacts(TrainerCallback):  # type: ignore[misc]
    """Keeps the load of the experts over the run; writes it whenever the model is saved, and at the end.

    Only the main process has a history to write.

    Args:
        output_dir: of the run.
        trackers: the other callbacks of the trainer, asked for their images' place when there is one to show.
    """

    def __init__(self, output_dir: str | Path, trackers: Iterable[TrainerCallback] = ()) -> None:
        self._directory = Path(output_dir)
        self._trackers = trackers
        self._history = RouterHistory()

    def add(self, state: TrainerState, shares: Mapping[str, list[float]]) -> None:
        """Record the load shares of the layers at the current step."""
        if state.is_world_process_zero:
            self._history.append(state.global_step, shares)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A run that goes on from a checkpoint goes on with its history too; another one starts anew."""
        if state.is_world_process_zero:
            self._history = RouterHistory()
            if state.global_step > 0:
                with _no_reason_to_lose_a_run("the load of the experts before this checkpoint"):
                    self._history = RouterHistory.load(self._directory / HISTORY_FILE)
            self._history.truncate(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A run that is killed later has everything up to here."""
        if state.is_world_process_zero:
            with _no_reason_to_lose_a_run("files and pictures of the routers"):
                self._save(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The last word; trackers are still open when this comes first of all callbacks."""
        if state.is_world_process_zero:
            with _no_reason_to_lose_a_run("files and pictures of the routers"):
                self._save(state.global_step)

    def _save(self, step: int) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._history.save(self._directory / HISTORY_FILE)
        pictures = {
            "router/heatmap": (self._directory / HEATMAP_FILE, save_heatmap),
            "router/max_vio": (self._directory / CURVE_FILE, save_max_vio_curve),
        }
        for name, (path, draw) in pictures.items():
            if draw(self._history, path):
                for tracker in self._trackers:
                    _show(tracker, f"{name}_picture", path, step)


@contextmanager
def _no_reason_to_lose_a_run(what: str) -> Iterator[None]:
    """A full disk, a damaged file or a tracker that is not reached is told, and training goes on."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"{what} are left out: {error!r}", RuntimeWarning, stacklevel=2)


def _show(tracker: Any, name: str, path: Path, step: int) -> None:
    """Send a PNG file to a tracker's callback, if it is one that takes images."""
    if getattr(tracker, "tb_writer", None) is not None:
        from matplotlib.image import imread

        tracker.tb_writer.add_image(name, imread(path), step, dataformats="HWC")
        return
    for module in (getattr(tracker, "_wandb", None), getattr(tracker, "_trackio", None)):
        if module is not None and hasattr(module, "Image"):
            module.log({name: module.Image(str(path))})
