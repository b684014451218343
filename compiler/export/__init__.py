"""Views of a plan for other tools. `plan.json` stays the source of truth."""

from __future__ import annotations

from .onnx import build_onnx, to_onnx
from .validate import validate_onnx

__all__ = ["build_onnx", "to_onnx", "validate_onnx"]
