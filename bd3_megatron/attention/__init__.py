"""Attention under the visibility rule: who may see whom, and the backends that compute it.

Here live the rule itself (visibility), the tensors a backend takes (streams), the reference (dense), the fast backends and
the table that chooses between them. No model, no process group, no foreign engine may be imported here.
"""
