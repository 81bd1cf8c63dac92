"""Kernels that make token importance cheap: each op has one public function and a plain-torch reference beside it."""

from keeprate_kernels.attention_lse import attention_lse
from keeprate_kernels.attention_received import attention_received, attention_rows
from keeprate_kernels.bipartite_match import bipartite_match
from keeprate_kernels.compact_kv import compact_kv
from keeprate_kernels.farthest_point import farthest_point
from keeprate_kernels.kept_rows_ce import kept_rows_ce
from keeprate_kernels.quantise_kv import Packed, dequantise, quantise, quantise_kv, quantise_mixed
from keeprate_kernels.selected_attention import merge_attention, ragged_attention, selected_attention
from keeprate_kernels.token_stats import TokenStats, token_stats

__all__ = [
    "Packed",
    "TokenStats",
    "attention_lse",
    "attention_received",
    "attention_rows",
    "bipartite_match",
    "compact_kv",
    "dequantise",
    "farthest_point",
    "kept_rows_ce",
    "merge_attention",
    "quantise",
    "quantise_kv",
    "quantise_mixed",
    "ragged_attention",
    "selected_attention",
    "token_stats",
]
