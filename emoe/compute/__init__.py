"""What a layer's experts compute with: the CPU or a GPU. docs/kernels.md and docs/cuda.md."""
