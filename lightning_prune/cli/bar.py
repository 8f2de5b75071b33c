"""The progress bar of the command line."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override

__all__ = ["SizeProgressBar"]


class SizeProgressBar(RichProgressBar):
    """Lightning's progress bar, showing the number of parameters as an integer."""

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        items = super().get_metrics(trainer, pl_module)
        params = items.get("params")
        if isinstance(params, float):
            items["params"] = f"{params:,.0f}"
        return {name: value for name, value in items.items() if name != "v_num"}
