"""Everything that imports torch: loading, forward pass, KV cache, noise, sampling."""
