"""Fused operations: each one a public function, an XLA reference and Pallas kernels."""
