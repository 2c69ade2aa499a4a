"""What travels with an exported folder: the plain model, its configuration, the counter generator, the decoding engine.

Every file here is copied beside the weights and loaded by transformers as remote code, so: relative imports only, all
files flat in one folder, nothing of the house. This door plate imports nothing.
"""
