"""One style for every figure: the same colour for a method everywhere, intervals drawn, labels at the lines."""

from keeprate.plot.charts import bars, curve, matrix, scatter
from keeprate.plot.images import clusters, heat, overlay, overlays, pictures
from keeprate.plot.look import colour, dashes, marker, style
from keeprate.plot.text import pieces, token_html, token_strips, token_text, token_texts
from keeprate.plot.widget import explore, sliders

__all__ = [
    "bars",
    "clusters",
    "colour",
    "curve",
    "dashes",
    "explore",
    "heat",
    "marker",
    "matrix",
    "overlay",
    "overlays",
    "pictures",
    "pieces",
    "scatter",
    "sliders",
    "style",
    "token_html",
    "token_strips",
    "token_text",
    "token_texts",
]
