"""Pretraining and mid-training of language models with the dispersion loss, on DeepSpeed ZeRO."""

from __future__ import annotations

import importlib.util

import torch

__version__ = "0.1.0"

_torchvision_operators: torch.library.Library | None = None  # the registration lives as long as this object


def _declare_missing_torchvision_operators() -> None:
    """Let `import torchvision` succeed beside a CPU build of torch, for which no torchvision build exists.

    Its wheel's compiled operators do not load there and the import dies on `operator torchvision::nms does not exist`;
    mosaicml-streaming and transformers import torchvision although nothing here uses it. Declaring the two schemas
    is enough. A machine whose builds match already has the operators, or loads them itself: nothing is declared there.
    """
    global _torchvision_operators
    if torch.version.cuda or torch.version.hip or importlib.util.find_spec("torchvision") is None:
        return
    if hasattr(torch.ops.torchvision, "nms"):
        return
    _torchvision_operators = torch.library.Library("torchvision", "FRAGMENT")  # noqa: TOR901
    _torchvision_operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _torchvision_operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_declare_missing_torchvision_operators()
