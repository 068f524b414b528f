"""Which method for my task: several stacks on the same data, their figures side by side."""
