"""Parts of tools/report.py: reading runs, findings in plain words, charts, sections, the page. Imports nothing."""
