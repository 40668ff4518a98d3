"""Images and texts as batches, and where their labels meet class names."""
