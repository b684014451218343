"""Which layout every tensor has over the devices of a stage."""
