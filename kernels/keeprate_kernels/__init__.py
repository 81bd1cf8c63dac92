"""Kernels that make token importance cheap: each op has one public function and a plain-torch reference beside it."""

from keeprate_kernels.attention_received import attention_received, attention_rows

__all__ = ["attention_received", "attention_rows"]
