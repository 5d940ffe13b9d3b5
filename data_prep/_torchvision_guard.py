"""Importing this module lets `import torchvision` succeed beside a CPU build of torch.

mosaicml-streaming and transformers import torchvision although text needs none of it. Beside a CPU build of
torch its compiled operators do not load, and the import dies on `operator torchvision::nms does not exist`.
Declaring the two missing schemas is enough. Where the builds match, nothing is declared.
The training package has a guard of its own: this folder stands alone.
"""

from __future__ import annotations

import importlib.util

import torch

_library: torch.library.Library | None = None  # the declaration lives as long as this object

if (
    not (torch.version.cuda or torch.version.hip)
    and importlib.util.find_spec("torchvision") is not None
    and not hasattr(torch.ops.torchvision, "nms")
):
    _library = torch.library.Library("torchvision", "FRAGMENT")  # noqa: TOR901
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
