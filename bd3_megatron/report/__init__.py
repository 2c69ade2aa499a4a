"""Reading what runs wrote: records, summaries, charts and the report page. Torch-free."""
