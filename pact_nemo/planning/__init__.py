"""What a run needs and how long it takes, before it starts: pure arithmetic on the model's shape, the layout and the
hardware.
"""
