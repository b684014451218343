"""From an unmodified `nn.Module` and example inputs to its forward graph, tensors and loss."""
