"""What a training step needs of memory, counted on tensors that have shapes and no values."""
