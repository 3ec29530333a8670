//! Pruning is score, plan, apply: groups of coupled slices, a printable plan, and surgery.
