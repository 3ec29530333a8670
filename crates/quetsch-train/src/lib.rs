//! Training for Quetsch: the tape over the coarse ops, the optimiser, the one loop, distillation and pruning scores.
