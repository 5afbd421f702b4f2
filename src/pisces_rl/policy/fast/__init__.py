"""Optional speed: compiled blocks, fused products and kernels; each is checked equal to the plain computation."""
