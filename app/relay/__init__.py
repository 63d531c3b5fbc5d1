"""The relay: carries one exchange between a client and a worker, byte-faithful, honest when it breaks."""
