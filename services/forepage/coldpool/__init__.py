"""The cold pool: one host's arena of KV records, its leases, its spill tiers, and the client of it."""
