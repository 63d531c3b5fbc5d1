"""Who is asking: tenants, their keys, and what the two may."""
