"""Reading checkpoints: the safetensors format, the index, the pair, and the file seam."""
