"""Images in, masks out: strangers' files, the model's square, PNGs of masks. Knows nothing of torch."""
