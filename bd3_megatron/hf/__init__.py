"""Files that travel with an exported folder: plain model, configuration, counter generator, decoding engine.

Every file here is copied beside the weights and loaded by transformers as remote code, so all files lie flat in one
folder and import each other relatively; nothing else of this package may be imported. This file imports nothing.
"""
