"""Runs the PTX that Triton compiles for an NVIDIA GPU, on a CPU: README.md."""
