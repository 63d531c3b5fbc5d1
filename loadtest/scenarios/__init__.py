"""What the queue promises, under load: open-loop arrivals, real gateways, a real Valkey, modelled engines."""
