"""Weights as int8 numbers and one scale for each row: what the operations for inference take."""

from __future__ import annotations

import torch


def quantize_rows(weight: torch.Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows `[..., N, D]` as int8 and a scale `[..., N]` each: the largest number of a row becomes 127.

    A row of zeros has the scale 0. What is not finite makes its row NaN: the scale carries it. Numbers are rounded to
    steps of the scale as `scale_dtype` holds it.
    """
    wide = weight.detach().float()
    scale = (wide.abs().amax(-1) / 127).to(scale_dtype).float()
    rows = torch.where(scale.unsqueeze(-1) > 0, wide / scale.unsqueeze(-1), 0.0)
    finite = scale.isfinite()
    rows = torch.where(finite.unsqueeze(-1), rows, 1.0)
    return rows.round().clamp(-127, 127).to(torch.int8), torch.where(finite, scale, float("nan")).to(scale_dtype)


def dequantize_rows(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weights `[..., N, D]` that int8 rows and their scales `[..., N]` stand for, in the dtype of the scales.

    Multiplied in float32 at least and rounded once.
    """
    wide = scale if scale.dtype == torch.float64 else scale.float()
    return (rows.to(wide.dtype) * wide.unsqueeze(-1)).to(scale.dtype)
