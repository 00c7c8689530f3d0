"""What can be known before a run is started, and is refused there."""
