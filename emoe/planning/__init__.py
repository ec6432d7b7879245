"""What fits into a budget: bytes of each kind, the KV cache, rates of this machine."""
