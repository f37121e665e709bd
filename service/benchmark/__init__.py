"""What serving costs beside the bare model: the parts of `python -m service.benchmark`. Stands above the engine."""
