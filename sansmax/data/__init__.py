"""Images, tables and huge pictures: from a path to batches of tensors or bands of patches."""
