"""keeprate: which tokens matter, and what becomes of the rest."""

from keeprate import vit
from keeprate.budget import Budget
from keeprate.method import method, methods

__all__ = ["Budget", "method", "methods", "vit"]
