"""Calibration: data sets, activation ranges, Q/DQ placement, thresholds and metrics, in numpy and onnx."""
