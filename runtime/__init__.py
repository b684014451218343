"""Execute: launch workers, run programs over gloo or NCCL, keep optimizer state and checkpoints."""
