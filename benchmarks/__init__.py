"""Measurements: speeds as ratios in one run, memory as bytes, medians."""
