"""One file a format of weights; `train.weights` chooses among them.

Every reader returns `Adapter` or `FullModel` with diffusers' names, every writer takes one. Names of NVIDIA's original
code come from the family (`ORIGINAL_NAMES`).
"""
