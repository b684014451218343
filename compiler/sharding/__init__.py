"""How operators run on parts of tensors: strategies, and the rewriting of a graph to local parts.

Between the values of the IR and everything that decides, predicts or translates: the rules are
read by the planner (what is possible), the verifier (is it legal) and codegen (what a rank
computes).
"""
