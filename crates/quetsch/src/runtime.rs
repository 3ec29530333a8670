//! Inference on the CPU: packed weights, workspaces, whole classifiers.
