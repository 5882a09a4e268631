"""The simulator with faults: the same cores and the same virtual time, with KV bytes, text, messages as on the wire,
and clients that check every token.

`chance` has the faults and their dice, `network`, `kv`, `processes` and `clients` the parts to which they happen,
`world` the whole and its promises."""
