"""Token reduction in vision transformers: one file a paper."""

from keeprate.vit.tome import ToMe
from keeprate.vit.topk import TopK

__all__ = ["ToMe", "TopK"]
