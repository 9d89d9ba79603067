"""Benchmarks: convolution layers and whole networks against everything a user would run instead."""
