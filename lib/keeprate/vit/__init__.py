"""Token reduction in vision transformers: one file a paper."""

from keeprate.vit.atc import ATC
from keeprate.vit.ats import ATS
from keeprate.vit.base import StagedMethod, Tokens, ViTMethod
from keeprate.vit.baselines import Radial, Random
from keeprate.vit.bat import BAT
from keeprate.vit.dpcknn import DPCKNN
from keeprate.vit.evit import EViT
from keeprate.vit.kmedoids import KMedoids
from keeprate.vit.mstm import MSTM
from keeprate.vit.pitome import PiToMe
from keeprate.vit.tokenpooling import TokenPooling
from keeprate.vit.tome import ToMe
from keeprate.vit.topk import TopK
from keeprate.vit.zerotprune import ZeroTPrune

__all__ = [
    "ATC",
    "ATS",
    "BAT",
    "DPCKNN",
    "MSTM",
    "EViT",
    "KMedoids",
    "PiToMe",
    "Radial",
    "Random",
    "StagedMethod",
    "ToMe",
    "TokenPooling",
    "Tokens",
    "TopK",
    "ViTMethod",
    "ZeroTPrune",
]
