"""From a graph and a plan to stage graphs, instructions and a readable file for every rank."""
