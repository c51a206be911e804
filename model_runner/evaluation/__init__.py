"""What a routing memory does to a model's loss: paired measurements, tables, plots, the demo."""
