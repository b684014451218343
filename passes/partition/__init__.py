"""Pipeline partitioning as a mathematical problem, free of graphs: state it, bound it, solve it."""
