"""Pictures and history of a run: where they are, and which trackers get them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from tests.sft.runs import sft
from trl_moe_ext.router.history import HISTORY_FILE
from trl_moe_ext.sft.artefacts import CURVE_FILE, HEATMAP_FILE

PNG = b"\x89PNG\r\n"
FILES = {CURVE_FILE, HEATMAP_FILE, HISTORY_FILE}


def test_files_of_a_run(tmp_path):
    trainer = sft(tmp_path, router_metrics="summary")
    trainer.train()
    assert {path.name for path in tmp_path.iterdir()} >= FILES
    assert (tmp_path / HEATMAP_FILE).read_bytes().startswith(PNG)
    assert (tmp_path / CURVE_FILE).read_bytes().startswith(PNG)
    records = json.loads((tmp_path / HISTORY_FILE).read_text())["records"]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert record["layers"].keys() == {"0", "1"}
        assert all(sum(shares) == pytest.approx(1, abs=1e-4) for shares in record["layers"].values())


def test_no_files_without_metrics(tmp_path):
    sft(tmp_path, router_metrics="off").train()
    assert not {path.name for path in tmp_path.iterdir()} & FILES


class TensorBoard(TrainerCallback):
    """As transformers' callback, which keeps a writer while the run lasts and closes it at the end."""

    def __init__(self):
        self.shown = []
        self.tb_writer = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.tb_writer = SimpleNamespace(add_image=self._show)

    def on_train_end(self, args, state, control, **kwargs):
        self.tb_writer = None

    def _show(self, name, image, step, dataformats):
        assert dataformats == "HWC"
        assert image.ndim == 3
        self.shown.append((name, step))


class Wandb(TrainerCallback):
    """As transformers' callback, which keeps the module."""

    def __init__(self):
        self.shown = []
        self._wandb = SimpleNamespace(Image=lambda path: path, log=self.shown.append)


def test_trackers_that_take_images_get_them(tmp_path):
    board, wandb = TensorBoard(), Wandb()
    sft(tmp_path, router_metrics="summary", others={"callbacks": [board, wandb]}).train()
    assert board.shown == [("router/heatmap_picture", 4), ("router/max_vio_picture", 4)]
    assert wandb.shown == [
        {"router/heatmap_picture": str(tmp_path / HEATMAP_FILE)},
        {"router/max_vio_picture": str(tmp_path / CURVE_FILE)},
    ]


def test_a_tracker_that_is_added_later_gets_them(tmp_path):
    board = TensorBoard()
    trainer = sft(tmp_path, router_metrics="summary")
    trainer.add_callback(board)
    trainer.train()
    assert len(board.shown) == 2


def test_a_tracker_that_is_not_reached_costs_no_run(tmp_path):
    class Unreachable(TrainerCallback):
        class tb_writer:  # noqa: N801
            @staticmethod
            def add_image(*args, **kwargs):
                raise OSError("no route to host")

    trainer = sft(tmp_path, router_metrics="summary", others={"callbacks": [Unreachable()]})
    with pytest.warns(RuntimeWarning, match="pictures of the routers are left out: OSError"):
        trainer.train()
    assert (tmp_path / HISTORY_FILE).exists()
    assert trainer.state.global_step == 4
