"""What a step says of itself: its record, warnings, noise of the gradient, broken numbers."""
