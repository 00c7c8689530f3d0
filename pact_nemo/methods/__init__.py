"""The training methods, one file each. ``base`` says what a method is asked, ``registry`` knows their names."""
