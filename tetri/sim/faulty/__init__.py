"""Simulation with injected faults: the same cores and virtual time, with real KV bytes, text, encoded messages and
clients that check every token.

`chance` defines the faults and draws them; `network`, `kv`, `processes` and `clients` are the parts that they affect;
`world` joins the parts and checks the guarantees."""
