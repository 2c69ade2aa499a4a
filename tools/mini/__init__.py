"""Parts of tools/reproduce_mini.py: what is trained, how it is run, what is measured, what may be concluded."""
