"""Everything that imports torch: loading, forward pass, KV cache, noise, sampling."""

import logging

# Where torchao is installed, transformers imports it, needed or not, and both it and torch then
# warn of kernels for other machines and of each other.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
