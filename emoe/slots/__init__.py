"""Which expert is in memory: slots, who leaves them, what is prefetched. Ids only; docs/slots.md."""
