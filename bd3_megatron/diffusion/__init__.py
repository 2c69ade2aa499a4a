"""What is learned, as pure mathematics: noise schedules and levels, corruption, objective, interval search, curriculum.

Tensors and numbers go in, tensors and numbers come out. No process group, no foreign engine, no clock and no generator
with a hidden state may be used here.
"""
