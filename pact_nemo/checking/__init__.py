"""What can be wrong with tools, tasks and traces, said before a GPU is touched."""
