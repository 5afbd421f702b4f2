"""Optional speed: compiled blocks, fused products and kernels; tests compare each with the plain computation."""
